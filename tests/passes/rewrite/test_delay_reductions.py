"""Reductions behind the contractions that read the same narrow tensor."""

import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import nn
from torch._inductor.utils import run_and_get_code

import precision_compiler
from precision_compiler.passes.rewrite.delay_reductions import DelayReductions
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.passes.rewrite.sink_casts import SinkCasts
from tests.helpers import graph, rewrite
from tests.random_graphs import inputs_of, rewrites

HEAD = "x:f32[64,32] w:f32[32,32]"
CHOSEN = {"a.store": "bf16", "b": "bf16", "b.store": "bf16"}
BEFORE = (InsertCasts(), SinkCasts(), FoldCasts())


def delayed(described: str, chosen: dict[str, str] = CHOSEN) -> tuple[list[str], bool]:
    """Names of operations in order after the pass, and whether it changed anything."""
    unit = rewrite(graph(described), chosen, *BEFORE)
    changed = DelayReductions().run(unit)
    unit.joint.module.graph.lint()
    calls = unit.joint.module.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
    kinds = {*calls, *(n for n in unit.joint.module.graph.nodes if "sum" in str(n.target))}
    return [n.name for n in unit.joint.module.graph.nodes if n in kinds], changed


def test_a_column_sum_waits_for_the_product_of_the_same_tensor() -> None:
    assert delayed(
        f"{HEAD} | a = relu x | s = sum.dim_IntList a [0] | b = mm a w | return s b"
    ) == (["b", "s"], True)


def test_it_waits_with_its_views_and_readers_and_for_the_first_product_only() -> None:
    described = (
        f"{HEAD} | a = relu x | v = view a [2,32,32] | s = sum.dim_IntList v [0,1] | n = neg s"
        " | t = permute a [1,0] | c = mm t x | b = mm a w | return n b c"
    )
    chosen = CHOSEN | {"c": "bf16", "c.store": "bf16"}
    assert delayed(described, chosen) == (["c", "s", "b"], True)


def test_its_cast_waits_where_the_sum_itself_comes_later_already() -> None:
    """What is added up would be computed from the cast's sources, as they were known then."""
    described = f"{HEAD} | a = relu x | b = mm a w | s = sum.dim_IntList a [0] | return s b"
    assert delayed(described) == (["b", "s"], True)


@pytest.mark.parametrize(
    ("described", "why"),
    [
        (
            "a = relu x | s = sum.dim_IntList a [0] | n = neg a | b = mm a w | return s n b",
            "an element-wise operation reads the same cast",
        ),
        (
            "a = relu x | s = sum.dim_IntList a [0] | v = expand s [32,32] | b = mm a v | return b",
            "the product needs the sum",
        ),
        (
            "a = relu x | s = sum.dim_IntList a [0] | b = mm x w | return s b a",
            "the product reads another tensor",
        ),
    ],
)
def test_it_stays_where(described: str, why: str) -> None:
    module = rewrite(graph(f"{HEAD} | {described}"), CHOSEN, *BEFORE).joint.module
    kinds = ("mm", "sum")
    before = [n.name for n in module.graph.nodes if any(k in str(n.target) for k in kinds)]
    assert delayed(f"{HEAD} | {described}") == (before, False), why


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(rewrites(("fp32", "bf16", "fp16")))
def test_order_changes_no_bit(case: tuple[str, dict[str, str]]) -> None:
    described, assignment = case
    plain = rewrite(graph(described), assignment, *BEFORE).joint.module
    moved = rewrite(graph(described), assignment, *BEFORE, DelayReductions()).joint.module
    inputs = inputs_of(plain)
    for one, two in zip(plain(*inputs), moved(*inputs), strict=True):
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))


SUM = re.compile(r"float tmp_acc0 = 0;(.*?tmp_acc0\w* = [^;]*tmp_acc0)", re.DOTALL)


class Fused(nn.Module):
    """Queries, keys and values from one matrix with a bias, as in torch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.inner(x).unflatten(-1, (3, 64)).unsqueeze(0).transpose(0, -2).squeeze(-2)
        first, second, third = parts.contiguous()
        product: torch.Tensor = first.sin() * second.cos() * third.exp()
        return product.sum()


def test_the_gradient_of_a_bias_is_summed_from_the_narrow_tensor() -> None:
    """In the code: what is added up comes from one tensor, not from the three parts of it."""
    torch.manual_seed(0)
    batch, model = torch.randn(16, 8, 64), Fused()
    plan = precision_compiler.make_plan(model, (batch,), overrides={"*": "bf16"})
    torch._dynamo.reset()
    compiled = precision_compiler.compile(model, plan=plan)
    _, codes = run_and_get_code(lambda: compiled(batch).backward())
    sums = [found for code in codes for found in SUM.findall(code)]
    assert sums
    assert all(len(set(re.findall(r"\w*_ptr\d+", body))) == 1 for body in sums)
