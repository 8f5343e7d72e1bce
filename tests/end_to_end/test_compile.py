"""Compiling real models in place: same object, right numbers, nothing lost on an error."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.nn import functional

import precision_compiler
from precision_compiler.capture import capture
from precision_compiler.compiler import rewritten
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.report.show import totals_view


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norm(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        wide: Tensor = self.down(functional.gelu(self.up(x)))
        return x + wide


class Decoder(nn.Module):
    def __init__(self, vocabulary: int = 64, width: int = 32, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        if targets is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batch_of(size: int = 4, length: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(0, 64, (size, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def model_of(**sizes: int) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**sizes)


def gradients(model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    model.zero_grad()
    model(*batch).backward()
    found = {name: value.grad for name, value in model.named_parameters()}
    return {name: grad.clone() for name, grad in found.items() if grad is not None}


@pytest.fixture(scope="module")
def low_precision() -> tuple[Decoder, precision_compiler.Plan]:
    """A model compiled with a plan that has low-precision contractions on any machine."""
    model = model_of()
    plan = precision_compiler.make_plan(model, batch_of(), target="a100", budget=0.02)
    return precision_compiler.compile(model, batch_of(), plan=plan), plan  # type: ignore[return-value]


def test_compiling_keeps_object_keys_and_dtypes() -> None:
    model = model_of()
    keys, dtypes = list(model.state_dict()), {p.dtype for p in model.parameters()}
    assert precision_compiler.compile(model, batch_of()) is model
    assert precision_compiler.plan_of(model).budget.asked == "auto"
    assert list(model.state_dict()) == keys
    assert {p.dtype for p in model.parameters()} == dtypes


def test_the_plan_of_a_trial_says_what_was_predicted_and_what_measured(tmp_path: Path) -> None:
    model = precision_compiler.compile(model_of(), batch_of())
    plan = precision_compiler.plan_of(model)
    plan.save(tmp_path / "plan.json")
    plan = precision_compiler.Plan.load(tmp_path / "plan.json")
    trial, totals = plan.trial, plan.totals
    assert trial is not None
    assert "fp32" in trial.anchors
    assert set(trial.prices) == set(trial.seconds)
    assert trial.prices["fp32"] == pytest.approx(totals.fp32_seconds)
    assert totals.calibrated == trial.calibrated
    assert totals.calibrated_seconds is not None
    (entry,) = [entry for entry in plan.journal if entry.step == "run-trial"]
    assert entry.message == trial.sentence
    told = "itself one of those that calibrate" if "plan" in trial.anchors else "as a sum of prices"
    assert told in trial.sentence
    assert trial.sentence in show_totals(plan)


def show_totals(plan: precision_compiler.Plan) -> str:
    stream = io.StringIO()
    Console(file=stream, width=1000).print(totals_view(plan))
    return stream.getvalue()


def test_compiled_gradients_are_within_the_predicted_error_of_the_rewritten_graph(
    low_precision: tuple[Decoder, precision_compiler.Plan],
) -> None:
    model, plan = low_precision
    batch = batch_of()
    found = gradients(model, batch)
    captured = capture(model_of(), batch)
    _, rewritten_gradients = gradients_of(captured, rewritten(captured.joint, plan))
    _, exact = gradients_of(captured)
    weights = [
        name
        for name, value in zip(captured.joint.names, captured.joint.inputs, strict=True)
        if isinstance(value, nn.Parameter)
    ]
    compiled = [found[name] for name in weights]
    assert {gradient.dtype for gradient in compiled} == {torch.float32}
    assert 0 < plan.predicted_gradient_error < 0.02
    assert relative_error(compiled, rewritten_gradients) < plan.predicted_gradient_error
    assert relative_error(compiled, exact) < 2 * plan.predicted_gradient_error
    assert relative_error(compiled, exact) > 0


def test_evaluation_and_other_batch_sizes_follow_the_plan(
    low_precision: tuple[Decoder, precision_compiler.Plan],
) -> None:
    model, plan = low_precision
    gradients(model, batch_of())
    tokens, targets = batch_of(3)
    reference = model_of()
    with torch.no_grad():
        assert torch.allclose(model(tokens), reference(tokens), atol=0.05)
        assert not torch.equal(model(tokens), reference(tokens))
    assert torch.isfinite(model(tokens, targets))
    with torch._dynamo.config.patch(error_on_recompile=True):  # sizes became symbolic
        assert torch.isfinite(model(*batch_of(5)))
    assert precision_compiler.plan_of(model) is plan


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads add embedding gradients in any order: with two, Inductor differs from itself."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_a_plan_of_fp32_everywhere_is_bit_identical_to_inductor() -> None:
    model, reference, batch = model_of(), model_of(), batch_of()
    plan = precision_compiler.make_plan(model, batch, budget=0)
    assert set(plan.assignment.values()) == {"fp32"}
    assert plan.totals.casts == 0
    precision_compiler.compile(model, batch, plan=plan)
    reference.compile()
    found, wanted = gradients(model, batch), gradients(reference, batch)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(model(*batch), reference(*batch))


class Halves(CustomGraphPass):
    """A user's pass: every GELU becomes its argument, halved; its gradient likewise."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.erf.default):
            node.target, node.args = torch.ops.aten.mul.Tensor, (node.args[0], 0.0)

    def uuid(self) -> str:
        return "halves"


@pytest.mark.usefixtures("one_thread")
def test_a_users_own_passes_run_before_ours() -> None:
    """And the plan is one of the graph that they leave behind."""
    batch, before, after = batch_of(), Halves(), Halves()
    model, plain = model_of(), model_of()
    own = {"joint_custom_pre_pass": before, "joint_custom_post_pass": [after]}
    with torch._inductor.config.patch(own):
        captured = capture(model, batch)
        seen = before.calls
        names = [node.target for node in captured.joint.module.graph.nodes]
        plan = precision_compiler.make_plan(model, batch, target="a100", budget=0.02)
        loss = precision_compiler.compile(model, batch, plan=plan)(*batch)
        loss.backward()
        assert before.calls > seen > 0
        assert after.calls > 0
        expected = torch.compile(plain)(*batch)
    assert torch.ops.aten.erf.default not in names
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert loss.item() != pytest.approx(model_of()(*batch).item(), rel=1e-4)


def test_without_a_batch_the_first_training_call_decides() -> None:
    model = precision_compiler.compile(model_of())
    with pytest.raises(precision_compiler.PlanError, match="first training batch"):
        precision_compiler.plan_of(model)
    model(*batch_of()).backward()
    names = set(precision_compiler.plan_of(model).sites)
    assert {"blocks.0.up.fprop", "blocks.0.up.dgrad", "blocks.0.up.wgrad"} <= names


def test_the_backend_is_found_by_name() -> None:
    model = model_of()
    options: Any = {"budget": 0.01}
    compiled = torch.compile(model, backend="precision", options=options)
    expected = model(*batch_of())
    assert torch.allclose(compiled(*batch_of()), expected, rtol=0.01)


WRONG_CALLS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"batch": (torch.zeros(2, 3, 5),)}, precision_compiler.CaptureError, "batch"),
    ({"batch": batch_of()[:1]}, precision_compiler.CaptureError, "scalar"),
    ({"batch": 3}, precision_compiler.CaptureError, "int"),
    ({"batch": batch_of(), "budget": -0.1}, precision_compiler.BudgetError, "-0.1"),
    ({"batch": batch_of(), "budget": "small"}, precision_compiler.BudgetError, "small"),
    ({"batch": batch_of(), "budget": "noise:lots"}, precision_compiler.BudgetError, "noise:lots"),
    ({"batch": batch_of(), "target": "h1000"}, precision_compiler.TargetError, "h1000"),
    ({"plan": "plan.json"}, precision_compiler.PlanError, "Plan.load"),
]


@pytest.mark.parametrize(("arguments", "error", "word"), WRONG_CALLS)
def test_mistakes_are_one_line_and_leave_the_model_alone(
    arguments: dict[str, Any], error: type[Exception], word: str
) -> None:
    model = model_of()
    before = dict(model.__dict__)
    with pytest.raises(error, match=word) as caught:
        precision_compiler.compile(model, **arguments)
    assert "\n" not in str(caught.value)
    assert model.__dict__ == before
    assert all(value.grad is None for value in model.parameters())


def test_a_plan_for_another_model_is_refused_by_its_first_site() -> None:
    plan = precision_compiler.make_plan(model_of(), batch_of())
    for other, site in (
        (model_of(width=48), "blocks.0.qkv.fprop"),
        (model_of(layers=2), "blocks.1"),
    ):
        with pytest.raises(precision_compiler.PlanMismatch, match=site):
            precision_compiler.compile(other, batch_of(), plan=plan)
        assert other._compiled_call_impl is None
