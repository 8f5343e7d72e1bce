"""The bf16 policy against what torch.autocast really does."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.formats import FORMATS
from precision_compiler.graph import contraction_rule, is_cast, uses_past_movement, value_of
from precision_compiler.journal import Journal
from precision_compiler.passes import DECIDE
from precision_compiler.passes.assign.score_autocast import ScoreAutocast, autocast_assignment
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.sites import named_nodes, output_nodes
from precision_compiler.statistics import Statistics
from tests.helpers import graph, machine, unit_of
from tests.models import captured, made

BEFORE = DECIDE[: [step.name for step in DECIDE].index("score-autocast")]


class Autocast(nn.Module):
    """A model under torch.autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Tensor, **kwargs: Tensor) -> object:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(*args, **kwargs)


@cache
def under_autocast(name: str) -> Captured:
    case = made(name)
    loss = case.loss

    def in_float32(output: Tensor, batch: object) -> Tensor:
        assert loss is not None
        return loss(output.float(), batch)

    return capture(Autocast(case.model), case.batch, None if loss is None else in_float32)


def policy(name: str) -> dict[str, str]:
    found = captured(name)
    unit = unit_of(graph("x:f32[2] | return x"), target=machine())
    return autocast_assignment(replace(unit, joint=found.joint.copy(), captured=found))


def contraction_dtypes(found: Captured) -> dict[str, torch.dtype]:
    """Dtype of the first result of every contraction, by its name."""
    assert found.joint.sites is not None
    dtypes: dict[str, torch.dtype] = {}
    for name, node in named_nodes(found.joint.module.graph).items():
        if contraction_rule(node) is not None:
            value = value_of(output_nodes(node)[0])
            assert value is not None
            dtypes[name.removeprefix("model.")] = value.dtype
    return dtypes


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "explicit", "vit", "handwritten"])
def test_contractions_return_what_they_return_under_autocast(name: str) -> None:
    real = contraction_dtypes(under_autocast(name))
    ours = {site: fmt for site, fmt in policy(name).items() if not site.endswith(".store")}
    assert len(real) == len(ours)
    assert set(real.values()) == {torch.bfloat16}
    assert set(ours.values()) == {"bf16"}
    kept = {site: fmt for site, fmt in policy(name).items() if f"{site}".endswith("prop.store")}
    assert set(kept.values()) == {"bf16"}


def kept_dtypes(node: fx.Node) -> set[torch.dtype]:
    """Dtype of a result, and the one it is cast to at once: a fused kernel keeps either."""
    readers = [user for user, _ in uses_past_movement(node)]
    cast_down = all(is_cast(user) and user.args[1] == torch.bfloat16 for user in readers)
    value = value_of(node)
    assert value is not None
    return {value.dtype, torch.bfloat16} if cast_down else {value.dtype}


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "explicit", "vit", "handwritten"])
def test_stored_tensors_have_the_dtypes_they_have_under_autocast(name: str) -> None:
    nodes = {
        path.removeprefix("model."): node
        for path, node in named_nodes(under_autocast(name).joint.module.graph).items()
    }
    ours = {
        site.removesuffix(".store"): FORMATS[fmt].dtype
        for site, fmt in policy(name).items()
        if site.endswith(".store")
    }
    known = [site for site in ours if site in nodes]
    wrong = [site for site in known if ours[site] not in kept_dtypes(nodes[site])]
    # Autocast sums some gradients in bf16, and decomposes some functions in float32.
    assert all(site.endswith(".grad") for site in wrong)
    assert len(wrong) <= 0.15 * len(known)


def scored(asked: float | str) -> Unit:
    found = captured("mlp")
    unit = Unit(found.joint.copy(), machine(), Budget.parse(asked), Journal(), found)
    Pipeline(BEFORE).run(unit)
    assert not ScoreAutocast().run(unit)
    return unit


def test_policy_is_scored_and_its_error_told() -> None:
    unit = scored("autocast")
    assert unit.baseline == policy("mlp")
    error = unit.problem.error(unit.baseline)
    assert 0 < error < 0.1
    assert unit.journal.entries[-1].step == "score-autocast"
    assert unit.journal.entries[-1].message.endswith(f"errs by {error:.3g}")


@pytest.mark.parametrize("asked", [0.125, "autocast", "auto"])
def test_budget_is_left_to_the_pass_that_sets_it(asked: float | str) -> None:
    assert scored(asked).budget == Budget.parse(asked)


def test_target_without_bf16_has_a_float32_policy() -> None:
    unit = unit_of(graph("x:f32[32,32] | a = mm x x | return a"), target=machine(fp32=1e12))
    unit.statistics = Statistics({}, {}, {})
    assert set(autocast_assignment(unit).values()) == {"fp32"}


def formats(described: str) -> dict[str, str]:
    """The policy by node."""
    unit = unit_of(graph(described), target=machine())
    names = {site.name: site.node for site in unit.joint.sites if site.kind == "storage"}
    return {names[name]: fmt for name, fmt in autocast_assignment(unit).items() if name in names}


@pytest.mark.parametrize(
    ("described", "node", "fmt"),
    [
        ("x:f32[32,32] | a = mm x x | b = relu a | c = mm b x | return c", "b", "bf16"),
        ("x:f32[32,32] | a = mm x x | b = add a x | c = mm b x | return c", "b", "fp32"),
        ("x:f32[32,32] | a = mm x x | t = t a | b = relu t | c = mm b x | return c", "b", "bf16"),
        (
            "x:f32[32,32] s:f32[] | a = mm x x | b = mul a s | c = mm b x | return c",
            "b", "bf16",
        ),
        (
            "x:f32[32,32] | a = mm x x | r = sum.dim_IntList a [1] true | b = div a r"
            " | c = mm b x | return c",
            "b", "fp32",
        ),
        (
            "x:f32[32,32] m:b8[32,32] | a = mm x x | b = where.self m a a | c = mm b x | return c",
            "b", "bf16",
        ),
        ("x:f32[32,32] | b = relu x | c = mm b x | return c", "b", "fp32"),
    ],
)  # fmt: skip
def test_dtype_follows_type_promotion(described: str, node: str, fmt: str) -> None:
    assert formats(described)[node] == fmt
