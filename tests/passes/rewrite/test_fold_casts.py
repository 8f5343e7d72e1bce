"""Folding: what each rule takes, and what none may take."""

import pytest
import torch
from torch import fx

from precision_compiler.facts import NodeFacts, set_facts
from precision_compiler.graph import is_cast
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.pipeline import Unit
from tests.helpers import graph, text, unit_of


def folded(described: str, ours: str = "") -> tuple[str, bool]:
    """The text after folding and whether anything changed; ``ours`` names casts we inserted."""
    unit = marked(graph(described), ours)
    changed = FoldCasts().run(unit)
    unit.joint.module.graph.lint()
    return text(unit.joint.module), changed


def marked(module: fx.GraphModule, ours: str) -> Unit:
    unit = unit_of(module)
    for node in module.graph.nodes:
        if node.name in ours.split():
            assert is_cast(node)
            set_facts(node, NodeFacts(node.name, reason="a test's"))
    return unit


@pytest.mark.parametrize(
    ("before", "ours", "after"),
    [
        (
            "x:bf16[4] | a = cast x bf16 | b = relu a | return b",
            "a",
            "x:bf16[4] | b = relu x | return b",
        ),
        (
            "x:f32[4] | a = cast x bf16 | b = cast x bf16 | c = mul a b | return c",
            "a b",
            "x:f32[4] | a = cast x bf16 | c = mul a a | return c",
        ),
        (  # the model's cast comes first, ours repeats it
            "x:f32[4] | a = cast x bf16 | b = cast x bf16 | return a b",
            "b",
            "x:f32[4] | a = cast x bf16 | return a a",
        ),
        (
            "x:bf16[4] | a = cast x f32 | b = cast a bf16 | c = relu b | return c a",
            "a",
            "x:bf16[4] | a = cast x f32 | c = relu x | return c a",
        ),
        (
            "x:f16[4] | a = cast x f32 | b = cast a f16 | return b a",
            "a",
            "x:f16[4] | a = cast x f32 | return x a",
        ),
    ],
)
def test_rule_takes_its_case(before: str, ours: str, after: str) -> None:
    assert folded(before, ours) == (after, True)


@pytest.mark.parametrize(
    ("described", "ours"),
    [
        # Rounding there and back loses bits: it is no identity.
        ("x:f32[4] | a = cast x bf16 | b = cast a f32 | return b", "a b"),
        ("x:f16[4] | a = cast x bf16 | b = cast a f16 | return b", "a b"),
        ("x:bf16[4] | a = cast x f16 | b = cast a bf16 | return b", "a b"),
        # Other dtypes, other tensors.
        ("x:f32[4] | a = cast x bf16 | b = cast x f16 | return a b", "a b"),
        ("x:f32[4] y:f32[4] | a = cast x bf16 | b = cast y bf16 | return a b", "a b"),
        # Widening between narrow formats by way of float32 is another number format.
        ("x:bf16[4] | a = cast x f32 | b = cast a f16 | return b", "a b"),
        # The model's own casts are the model's business.
        ("x:f32[4] | a = cast x bf16 | b = cast x bf16 | return a b", ""),
        ("x:f32[4] | a = relu x | return a", ""),
    ],
)
def test_what_is_no_case_is_left_alone(described: str, ours: str) -> None:
    assert folded(described, ours) == (described, False)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_every_narrow_number_survives_float32_and_back(narrow: torch.dtype) -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = codes.view(narrow)
    back = numbers.float().to(narrow)
    nan = numbers.isnan()
    assert torch.equal(back.isnan(), nan)
    assert torch.equal(back[~nan].view(torch.int16), codes[~nan])
