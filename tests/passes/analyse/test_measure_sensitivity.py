"""Predicted errors against the errors that rounding a tensor really causes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.attention import substitutes
from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.compiler import rewritten
from precision_compiler.errors import AnalysisError, InternalError
from precision_compiler.formats import FORMATS, Format, quantised, ulp
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.replay import execute, gradients_of, relative_error
from precision_compiler.sampling import sampled
from precision_compiler.statistics import Sensitivity, Statistics
from tests import models
from tests.helpers import graph, joint_of, machine
from tests.models import MODELS, Case, captured, made, planned

Run = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]


def measured(found: Captured, *others: Captured, **options: Any) -> Statistics:
    unit = Unit(found.joint.copy(), machine(), Budget.parse("auto"), Journal(), found, others)
    assert not MeasureSensitivity(**options).run(unit)
    assert unit.statistics is not None
    return unit.statistics


def drawn(make: Callable[[], Case]) -> Captured:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        case = make()
    return capture(case.model, case.batch, case.loss)


def batch_of(rows: int) -> tuple[Tensor, ...]:
    """A batch for the two-layer model."""
    generator = torch.Generator().manual_seed(3)
    return tuple(torch.randn(rows, 16, generator=generator) * 3 for _ in range(2))


def roundings(found: Captured, fmt: Format, every: int) -> list[tuple[str, float, float]]:
    """Single roundings in a model: what is rounded, its predicted and its real error."""
    stats, exact = measured(found), gradients_of(found)[1]
    links = find_links(found.joint)
    nodes = {site.name: site.node for site in found.joint.sites}
    trials: list[tuple[str, Sensitivity, Run]] = []
    for store, seen in stats.stores.items():
        trials.append((store, seen, _rounded_result(nodes[store], fmt)))
    for link in links.reads:
        seen = stats.operands[link.contraction, link.argument]
        run = _rounded_argument(nodes[link.contraction], link.argument, fmt)
        trials.append((f"{link.contraction}[{link.argument}]", seen, run))
    for site, inside in stats.internals.items():
        for index, seen in enumerate(inside):
            run = _rounded_inside(nodes[site], index, fmt)
            trials.append((f"{site}({index})", seen, run))
    return [
        (label, seen.variance(fmt) ** 0.5, relative_error(gradients_of(found, run=run)[1], exact))
        for label, seen, run in trials[::every]
    ]


def _rounded_result(name: str, fmt: Format) -> Run:
    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = execute(node, args, kwargs)
        return quantised(value, fmt) if node.name == name else value

    return run


def _rounded_argument(name: str, index: int, fmt: Format) -> Run:
    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name == name:
            args = (*args[:index], quantised(args[index], fmt), *args[index + 1 :])
        return execute(node, args, kwargs)

    return run


def _rounded_inside(name: str, index: int, fmt: Format) -> Run:
    formulas = substitutes()

    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name != name:
            return execute(node, args, kwargs)
        taps = iter(range(9))

        def tap(value: Tensor) -> Tensor:
            return quantised(value, fmt) if next(taps) == index else value

        return formulas[node.target](tap, *args, **kwargs)

    return run


@pytest.mark.parametrize(
    ("make", "fmt"),
    [
        (models.mlp, "bf16"),
        (models.mlp, "fp16"),
        (models.mlp, "e4m3"),
        (partial(models.gpt, batch=8, length=11, blocks=1), "bf16"),
        (models.llama, "bf16"),
        (partial(models.explicit, batch=8), "bf16"),
        (partial(models.vit, batch=32), "bf16"),
    ],
)
def test_predicted_error_of_every_rounding_is_the_real_one(
    make: Callable[[], Case], fmt: str
) -> None:
    every = 1 if make is models.mlp else 3  # of the larger models a third
    found = roundings(drawn(make), FORMATS[fmt], every)
    noise = 3e-6  # of float32 itself
    wrong = [
        f"{label}: predicted {predicted:.2e}, real {real:.2e}"
        for label, predicted, real in found
        if not real / 2 - noise <= predicted <= 2 * real + noise
    ]
    assert len(found) > 10
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "vit"])
def test_predicted_error_of_a_whole_plan_is_the_real_one(name: str) -> None:
    found, plan = captured(name), planned(name)
    assert {"bf16", "fp16"} & set(plan.assignment.values())
    module = rewritten(found.joint, plan)
    real = relative_error(gradients_of(found, module)[1], gradients_of(found)[1])
    assert real / 1.5 <= plan.predicted_gradient_error <= 1.5 * real


class Slope(nn.Module):
    """A loss that is linear in its only parameter: gradients are sums of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sum()


class Sinks(nn.Module):
    """A layer of which some tokens decide the loss, each by one loud channel."""

    share: Tensor

    def __init__(self, tokens: int, loud: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(256, 64, bias=False)
        self.gain = nn.Parameter(torch.ones(256))
        self.register_buffer("share", torch.ones(tokens, 1).index_fill(0, loud, 300))

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.share * self.linear(x * self.gain).square()).mean()
        return loss


@pytest.mark.parametrize("fmt", ["e5m2", "e4m3"])
def test_error_that_elements_outside_of_the_sample_cause_is_predicted(fmt: str) -> None:
    tokens, width = 512, 256
    seen = sampled(torch.arange(float(tokens * width)).view(tokens, width)).long()
    unseen = torch.ones(tokens * width, dtype=torch.bool).index_fill(0, seen, False)
    loud, channels = torch.arange(0, tokens, 8), torch.arange(1, width, 4)
    hidden = unseen.view(tokens, width)[loud, channels]
    loud, channels = loud[hidden], channels[hidden]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(tokens, width) * 0.1
        x[loud, channels] = torch.randn(len(loud)).sign() * torch.linspace(8, 15, len(loud))
        found = roundings(capture(Sinks(tokens, loud), (x,)), FORMATS[fmt], 1)
    assert len(loud) > 50
    assert {"linear.fprop[0]", "linear.wgrad[1]", "mul.store"} <= {label for label, *_ in found}
    for label, predicted, real in found:
        assert 0.5 < predicted / real < 2, label


def test_error_of_a_linear_loss_is_the_error_of_the_inputs() -> None:
    """The gradient is the column sums of x: rounding x errs by the sum of ulp^2 / 12."""
    x = torch.randn(32, 40, generator=torch.Generator().manual_seed(0))
    stats = measured(capture(Slope(), x))
    assert stats.loss == pytest.approx(x.sum().item(), rel=1e-4)
    assert stats.gradient_norm == pytest.approx(x.sum(0).norm().item(), rel=1e-5)
    largest = x.abs().amax().item()
    seen = {site: s for (site, _), s in stats.operands.items() if s.amax == largest}
    for fmt in (FORMATS["bf16"], FORMATS["fp16"], FORMATS["tf32"]):
        square = ulp(x, fmt).square().sum().item() / 12
        relative = square / stats.gradient_norm**2
        assert seen["linear.wgrad"].variance(fmt) == pytest.approx(relative, rel=1e-6)
        assert seen["linear.fprop"].variance(fmt) == 0.0  # no gradient depends on the forward pass
        assert seen["linear.fprop"].variance(fmt, metric=2) == pytest.approx(square, rel=1e-6)


def test_tensors_that_no_input_reaches_are_measured_too() -> None:
    """The gradient of a mean starts from a constant; an error there scales every gradient."""
    stats = measured(captured("handwritten"))
    for sensitivity in stats.stores.values():
        assert sensitivity.amax > 0
    batch = batch_of(32)[0]
    found = capture(nn.Linear(16, 4, bias=False), batch, lambda output, _: output.sum())
    operands = measured(found).operands
    assert all(o.weight.sum() > 0 for (site, _), o in operands.items() if site.endswith("wgrad"))


def test_several_batches_are_averaged() -> None:
    case = made("mlp")
    first = capture(case.model, case.batch)
    second = first.on(batch_of(32))
    one, other, both = measured(first), measured(second, seed=1), measured(first, second)
    assert (both.batches, one.batches) == (2, 1)
    for key, mean in both.stores.items():
        pair = one.stores[key], other.stores[key]
        assert np.array_equal(mean.weight, (pair[0].weight + pair[1].weight) / 2)
        assert mean.amax == max(pair[0].amax, pair[1].amax)
    for field in ("gradient_norm", "loss"):
        expected = (getattr(one, field) + getattr(other, field)) / 2
        assert getattr(both, field) == pytest.approx(expected)
    gradients = [gradients_of(batch)[1] for batch in (first, second)]
    distance = sum(float((a - b).square().sum()) for a, b in zip(*gradients, strict=True)) ** 0.5
    assert both.noise == pytest.approx(distance / 2**0.5 / both.gradient_norm, rel=1e-4)


@pytest.mark.parametrize(("first", "second"), [(32, 64), (32, 8), (8, 32)])
def test_batches_of_other_sizes_are_averaged_too(first: int, second: int) -> None:
    """Whether a small tensor counts as stored depends on its size: what both know is averaged."""
    case = made("mlp")
    one = capture(case.model, tuple(tensor[:first] for tensor in case.batch))
    other = one.on(batch_of(second))
    stats = measured(one, other)
    assert stats.batches == 2
    assert set(stats.stores) == set(find_links(one.joint).stores)
    edge = "up.fprop", 1
    mean = (measured(one).operands[edge].weight + measured(other, seed=1).operands[edge].weight) / 2
    assert stats.operands[edge].weight == pytest.approx(mean)


def test_same_seed_same_statistics_and_another_seed_about_the_same() -> None:
    found = captured("mlp")
    one, same, other = measured(found), measured(found), measured(found, seed=1)
    for name, sensitivity in one.stores.items():
        assert (sensitivity.weight == same.stores[name].weight).all()
        size = sensitivity.variance(FORMATS["bf16"])
        assert other.stores[name].variance(FORMATS["bf16"]) == pytest.approx(size, rel=0.7)


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_measured_and_the_model_left_alone(name: str) -> None:
    found = captured(name)
    inputs = [value.clone() if isinstance(value, Tensor) else value for value in found.joint.inputs]
    stats, links = measured(found), find_links(found.joint)
    assert set(stats.stores) == set(links.stores)
    assert set(stats.operands) == {(link.contraction, link.argument) for link in links.reads}
    for sensitivity in [*stats.stores.values(), *stats.operands.values()]:
        assert (sensitivity.weight >= 0).all()
        assert sensitivity.amax >= 0
    for value, before in zip(found.joint.inputs, inputs, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value, before)
            assert value.grad is None


@pytest.mark.parametrize(
    ("batch", "loss", "norm"),
    [
        (torch.zeros(2, 4), lambda output, _: (output * 0).sum(), r"0\.0"),
        (torch.full((2, 4), torch.inf), lambda output, _: output.square().sum(), "(nan|inf)"),
    ],
)
def test_loss_without_a_finite_slope_is_an_error(
    batch: Tensor, loss: Callable[[Tensor, Any], Tensor], norm: str
) -> None:
    with pytest.raises(AnalysisError, match=f"gradient norm on this batch is {norm}"):
        measured(capture(nn.Linear(4, 4), batch, loss))


@torch.library.custom_op("analysis_test::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    return x**3


@torch.library.custom_op("analysis_test::cube_backward", mutates_args=())
def cube_backward(x: Tensor, grad: Tensor) -> Tensor:
    return 3 * x**2 * grad


class Ending(nn.Module):
    """A linear layer, and what is made of its results."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc, self.last = nn.Linear(16, 16), last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.fc(x))


def test_registered_operator_without_a_second_derivative_is_named() -> None:
    """Such as the experts of transformers' mixtures, whose formula for training is enough."""
    cube.register_fake(torch.empty_like)
    cube_backward.register_fake(lambda x, grad: torch.empty_like(x))
    cube.register_autograd(
        lambda ctx, grad: cube_backward(*ctx.saved_tensors, grad),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    )
    found = capture(Ending(cube), batch_of(4)[:1], lambda output, _: output.sum())
    told = r"^cube\.grad: analysis_test\.cube_backward\.default has no derivative"
    with pytest.raises(AnalysisError, match=told):
        measured(found)


def distances(output: Tensor) -> Tensor:
    return torch.cdist(output, output.flip(0)).sum()


def alignment(output: Tensor) -> Tensor:
    scores = output.unsqueeze(1).log_softmax(-1)
    size = torch.tensor([3]), torch.tensor([2])
    return nn.functional.ctc_loss(scores, torch.tensor([[1, 2]]), *size)


def test_operator_of_torch_without_a_second_derivative_is_named() -> None:
    found = capture(Ending(distances), batch_of(3)[:1], lambda output, _: output)
    told = r"^cdist\.grad: _cdist_backward has no derivative"
    with pytest.raises(AnalysisError, match=told):
        measured(found)


@pytest.mark.parametrize(
    ("loss", "operator"), [(distances, "_cdist_backward"), (alignment, "aten._ctc_loss_backward")]
)
def test_loss_without_a_second_derivative_is_named(
    loss: Callable[[Tensor], Tensor], operator: str
) -> None:
    found = capture(Ending(nn.Identity()), batch_of(3)[:1], lambda output, _: loss(output))
    with pytest.raises(AnalysisError, match=rf"^the loss: {operator} has no derivative"):
        measured(found)


def test_graph_without_inputs_is_our_bug() -> None:
    joint = joint_of(graph("x:f32[4,4] | a = mm x x | return a"))
    with pytest.raises(InternalError):
        MeasureSensitivity().run(Unit(joint, machine(), Budget.parse(1.0), Journal()))
