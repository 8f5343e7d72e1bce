"""Casts below slices: fewer bytes, the same numbers."""

from math import prod

import torch
from hypothesis import HealthCheck, given, settings
from torch import fx

from precision_compiler.graph import shape_of
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.passes.rewrite.sink_casts import SinkCasts
from precision_compiler.verify import is_ours
from tests.helpers import graph, rewrite, text
from tests.random_graphs import inputs_of, rewrites

HEAD = "x:f32[64,32] w:f32[32,32]"


def cast_elements(module: fx.GraphModule) -> int:
    return sum(prod(shape_of(node)) for node in module.graph.nodes if is_ours(node))


def test_cast_moves_below_the_slice_that_alone_is_read() -> None:
    described = f"{HEAD} | a = slice.Tensor x 0 0 32 | b = mm a w | return b"
    chosen = {"b": "bf16", "b.store": "bf16"}
    module = rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module
    narrow = [node for node in module.graph.nodes if is_ours(node)]
    assert sorted(shape_of(node) for node in narrow) == [(32, 32)] * 3


def test_cast_moves_below_several_views_at_once() -> None:
    described = (
        f"{HEAD} | a = slice.Tensor x 0 0 32 | b = slice.Tensor a 0 0 8 | c = mm b w | return c"
    )
    chosen = {"c": "fp16"}
    unit = rewrite(graph(described), chosen, InsertCasts(), SinkCasts())
    shapes = [shape_of(node) for node in unit.joint.module.graph.nodes if is_ours(node)]
    assert sorted(shapes) == [(8, 32), (8, 32), (32, 32)]


def test_what_both_readers_copy_is_copied_once_and_narrow() -> None:
    """A product and a column sum, as of a linear layer's backward pass, behind the same copy."""
    described = (
        f"{HEAD} | a = relu x | p = permute a [1,0] | q = clone p"
        " | b = mm w q | s = sum.dim_IntList q [1] | return b s"
    )
    chosen = {"a.store": "bf16", "b": "bf16", "b.store": "bf16"}
    before = rewrite(graph(described), chosen, InsertCasts()).joint.module
    after = rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module
    copied = [
        [node.meta["val"].dtype for node in module.graph.nodes if "clone" in str(node.target)]
        for module in (before, after)
    ]
    assert set(copied[0]) == {torch.bfloat16, torch.float32}
    assert copied[1] == [torch.bfloat16]
    assert cast_elements(after) == cast_elements(before)
    for found, expected in zip(after(*inputs_of(before)), before(*inputs_of(before)), strict=True):
        assert torch.equal(found, expected)


def test_what_the_forward_pass_reads_is_computed_there() -> None:
    """Its float32 view comes first; the narrow one is the backward pass's."""
    described = (
        f"{HEAD} | a = relu x | p = permute a [1,0] | s = sum.dim_IntList p [1]"
        " | q@backward = permute a [1,0] | b@backward = mm w q | return s b"
    )
    chosen = {"a.store": "bf16", "b": "bf16", "b.store": "bf16"}
    module = rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module
    views = [node for node in module.graph.nodes if "permute" in str(node.target)]
    assert len(views) == 1  # shared
    (total,) = (node for node in module.graph.nodes if "sum" in str(node.target))
    waiting, above = [total], set()
    while waiting:
        above.add(node := waiting.pop())
        waiting.extend(node.all_input_nodes)
    assert "is_backward" not in {node.meta.get("partitioner_tag") for node in above}


def test_cast_stays_where_the_whole_tensor_is_read() -> None:
    described = f"{HEAD} | a = slice.Tensor x 0 0 32 | b = mm a w | c = mm x w | return b c"
    chosen = {"b": "bf16", "b.store": "bf16", "c": "bf16", "c.store": "bf16"}
    before = text(rewrite(graph(described), chosen, InsertCasts()).joint.module)
    after = text(rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module)
    assert after == before


def test_cast_stays_above_views_that_show_as_many_elements() -> None:
    described = f"{HEAD} | a = t x | b = mm a x | return b"
    chosen = {"b": "bf16", "b.store": "bf16"}
    before = text(rewrite(graph(described), chosen, InsertCasts()).joint.module)
    after = text(rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module)
    assert after == before


def test_cast_stays_above_an_overlap_that_reads_more_than_there_is() -> None:
    described = (
        f"{HEAD} | a = slice.Tensor x 0 0 48 | b = slice.Tensor x 0 16 64"
        " | c = mm a w | d = mm b w | return c d"
    )
    chosen = {"c": "bf16", "c.store": "bf16", "d": "bf16", "d.store": "bf16"}
    before = text(rewrite(graph(described), chosen, InsertCasts()).joint.module)
    after = text(rewrite(graph(described), chosen, InsertCasts(), SinkCasts()).joint.module)
    assert after == before


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(rewrites(("fp32", "bf16", "fp16")))
def test_sinking_and_folding_change_no_bit_and_cast_no_more(
    case: tuple[str, dict[str, str]],
) -> None:
    described, assignment = case
    plain = rewrite(graph(described), assignment, InsertCasts()).joint.module
    sunk = rewrite(graph(described), assignment, InsertCasts(), SinkCasts()).joint.module
    unit = rewrite(graph(described), assignment, InsertCasts(), SinkCasts(), FoldCasts())
    folded = unit.joint.module
    assert cast_elements(folded) <= cast_elements(sunk) <= cast_elements(plain)
    inputs = inputs_of(plain)
    for one, two, three in zip(plain(*inputs), sunk(*inputs), folded(*inputs), strict=True):
        assert one.dtype == two.dtype == three.dtype
        assert torch.equal(one.nan_to_num(7), two.nan_to_num(7))
        assert torch.equal(two.nan_to_num(7), three.nan_to_num(7))
    assert not SinkCasts().run(unit)
    assert not FoldCasts().run(unit)
