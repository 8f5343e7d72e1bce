"""Casts: as the assignment says, none too many, and nothing else changed."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, fx

from precision_compiler.graph import (
    contraction_rule,
    is_cast,
    root_of,
    uses_past_movement,
    value_of,
)
from precision_compiler.passes.lower.emulate_formats import EmulateFormats
from precision_compiler.passes.rewrite.fold_casts import FoldCasts
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.sites import rounded_arguments
from precision_compiler.verify import is_ours, result_dtypes
from tests.helpers import graph, rewrite, text
from tests.random_graphs import emulated, inputs_of, rewrites

often = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
HEAD = "x:f32[32,32] w:f32[32,32]"


def inserted(described: str, assignment: Mapping[str, str]) -> fx.GraphModule:
    return rewrite(graph(described), assignment, InsertCasts()).joint.module


def casts_of(module: fx.GraphModule) -> list[fx.Node]:
    return [node for node in module.graph.nodes if is_ours(node)]


def run(module: fx.GraphModule) -> list[Tensor]:
    results = module(*inputs_of(module))
    assert isinstance(results, tuple)
    return [value for value in results if isinstance(value, Tensor)]


def test_contraction_reads_casts_and_its_reader_reads_a_cast_back() -> None:
    module = inserted(
        f"{HEAD} | a = mm x w | b = relu a | return b", {"a": "bf16", "a.store": "bf16"}
    )
    assert text(module) == (
        f"{HEAD} | cast_1 = cast w bf16 | cast = cast x bf16 | a = mm cast cast_1"
        " | cast_2 = cast a f32 | b = relu cast_2 | return b"
    )


def test_contractions_in_a_row_share_the_narrow_tensor() -> None:
    module = inserted(
        f"{HEAD} | a = mm x w | b = mm a w | return b",
        {"a": "bf16", "a.store": "bf16", "b": "bf16", "b.store": "bf16"},
    )
    assert len(casts_of(module)) == 3  # x, w, and the result back


def test_stored_tensor_is_read_from_the_narrow_copy_by_all() -> None:
    module = inserted(f"{HEAD} | a = relu x | b = mm a w | return a b", {"a.store": "fp16"})
    narrow, wide = casts_of(module)
    relu = next(node for node in module.graph.nodes if node.name == "a")
    assert narrow.args == (relu, torch.float16)
    assert wide.args == (narrow, torch.float32)
    results = module.graph.output_node().args[0]
    assert isinstance(results, tuple)
    assert results[0] is wide


def test_cast_stands_before_the_broadcast() -> None:
    module = inserted(
        "x:f32[32,32] | a = unsqueeze x 0 | b = expand a [8,32,32] | c = bmm b b | return c",
        {"c": "bf16", "c.store": "bf16"},
    )
    first = casts_of(module)[0]
    assert first.args[0] == module.graph.find_nodes(op="placeholder")[0]
    assert len(casts_of(module)) == 2


def test_one_tensor_read_twice_by_one_contraction_is_cast_once() -> None:
    module = inserted("x:f32[32,32] | a = mm x x | return a", {"a": "fp16", "a.store": "fp16"})
    assert len(casts_of(module)) == 2


def test_one_tensor_read_as_operand_and_bias_is_cast_once() -> None:
    module = inserted("x:f32[32,32] | a = addmm x x x | return a", {"a": "bf16", "a.store": "bf16"})
    assert [str(node.args[1]) for node in casts_of(module)] == ["torch.bfloat16", "torch.float32"]


def test_integer_and_scalar_arguments_are_left_alone() -> None:
    module = inserted(
        "x:f32[32,32] i:i64[4] | a = index_select x 0 i | b = mm a x | return b",
        {"b": "bf16", "b.store": "bf16"},
    )
    holders = module.graph.find_nodes(op="placeholder")
    assert not any(is_cast(user) for user in holders[1].users)


def test_emulated_formats_get_no_cast() -> None:
    described = f"{HEAD} | a = mm x w | b = mm a w | return b"
    for fmt in ("tf32", "e4m3", "e5m2"):
        assert text(inserted(described, {"a": fmt, "b": fmt})) == described


def test_backward_results_are_cast_in_the_backward_pass() -> None:
    module = inserted(
        f"{HEAD} tangents_1:f32[32,32] | a = mm x w | b = t w | c@backward = mm tangents_1 b"
        " | d@backward = relu c | return a d",
        {"c": "bf16", "c.store": "bf16"},
    )
    back = next(node for node in casts_of(module) if node.args[1] == torch.float32)
    assert back.meta["partitioner_tag"] == "is_backward"


def test_fused_attention_returns_its_format_through_its_first_output_only() -> None:
    module = inserted(
        "q:f32[1,2,16,32]"
        " | a = _scaled_dot_product_flash_attention_for_cpu q q q 0.0 true"
        " | o = getitem a 0 | l = getitem a 1 | s = relu o | return s l",
        {"a": "bf16", "o.store": "bf16"},
    )
    by_name = {node.name: node for node in module.graph.nodes}
    outcome = value_of(by_name["o"]), value_of(by_name["l"])
    assert [value.dtype for value in outcome if value is not None] == [
        torch.bfloat16,
        torch.float32,
    ]
    assert len(casts_of(module)) == 2


@often
@given(rewrites(("fp32", "tf32", "bf16", "fp16")))
def test_no_cast_is_idle_or_repeated_and_results_keep_their_dtypes(
    case: tuple[str, dict[str, str]],
) -> None:
    described, assignment = case
    before = result_dtypes(graph(described).graph)
    module = inserted(described, assignment)
    assert result_dtypes(module.graph) == before
    made: set[tuple[object, object]] = set()
    for node in casts_of(module):
        source, dtype = node.args[0], node.args[1]
        assert isinstance(source, fx.Node)
        value = value_of(source)
        assert value is not None
        assert value.dtype != dtype
        assert (root_of(source), dtype) not in made
        made.add((root_of(source), dtype))
    for found, expected in zip(run(module), before, strict=True):
        assert found.dtype == expected
    for node in module.graph.nodes:  # what was predicted about each node is what it gives
        if contraction_rule(node) is not None:
            dtypes = {read.meta["val"].dtype for read in rounded_arguments(node).values()}
            assert len(dtypes) == 1


@often
@given(rewrites(("fp32",)))
def test_float32_everywhere_leaves_the_graph_untouched(case: tuple[str, dict[str, str]]) -> None:
    module = graph(case[0])
    everywhere = dict.fromkeys(case[1], "fp32")
    before = text(module)
    unit = rewrite(module, everywhere, InsertCasts())
    assert text(unit.joint.module) == before


@often
@given(rewrites(("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")))
def test_rewritten_graph_computes_what_the_assignment_means(
    case: tuple[str, dict[str, str]],
) -> None:
    described, assignment = case
    unit = rewrite(graph(described), assignment, InsertCasts(), FoldCasts(), EmulateFormats())
    for found, expected in zip(
        run(unit.joint.module), emulated(described, assignment), strict=True
    ):
        assert torch.equal(found.float().nan_to_num(7), expected.float().nan_to_num(7))


@often
@given(rewrites(most=5))
def test_no_fewer_casts_meet_the_demands(case: tuple[str, dict[str, str]]) -> None:
    described, assignment = case
    module = inserted(described, assignment)
    assert len(casts_of(module)) == fewest_casts(described, assignment)


Label = tuple[torch.dtype, frozenset[torch.dtype]]
"""A copy of a tensor: its dtype, and the narrow dtypes its values have been rounded to."""


def fewest_casts(described: str, assignment: Mapping[str, str]) -> int:
    """The least number of conversions that gives every reader what it asks for, by trying all."""
    nodes = list(graph(described).graph.nodes)
    total = 0
    for node in nodes:
        value = value_of(node)
        if value is None or value.dtype != torch.float32 or root_of(node) is not node:
            continue
        native = _DTYPES[assignment.get(node.name, "fp32")]
        stored = _DTYPES[assignment.get(f"{node.name}.store", "fp32")]
        if f"{node.name}.store" not in assignment:
            stored = native
        start = _rounded((torch.float32, frozenset()), native)
        kept = _rounded(start, stored)
        asked = {_rounded(kept, dtype) for dtype in _asked(node, assignment)}
        total += _fewest(start, asked)
    return total


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _rounded(label: Label, dtype: torch.dtype) -> Label:
    return dtype, label[1] | (frozenset() if dtype == torch.float32 else frozenset([dtype]))


def _asked(node: fx.Node, assignment: Mapping[str, str]) -> set[torch.dtype]:
    found: set[torch.dtype] = set()
    for user, through in uses_past_movement(node):
        rounded = contraction_rule(user) is not None and through in rounded_arguments(user).values()
        wanted = assignment.get(user.name, "fp32") if rounded else "fp32"
        found.add(_DTYPES[wanted])
    return found


def _fewest(start: Label, asked: set[Label]) -> int:
    """Smallest set of labels that holds ``asked`` and where each comes from another by one cast."""
    dtypes = list(_DTYPES.values())
    subsets = [
        frozenset(chosen)
        for count in range(3)
        for chosen in itertools.combinations(dtypes[1:], count)
    ]
    labels = [
        (dtype, rounded) for dtype in dtypes for rounded in subsets if (dtype, rounded) != start
    ]
    for count in range(len(labels)):
        for chosen in itertools.combinations(labels, count):
            there = {start, *chosen}
            made = all(
                any(_rounded(other, label[0]) == label for other in there - {label})
                for label in chosen
            )
            if made and asked <= there:
                return count
    raise AssertionError("no set of casts meets the demands")


def test_pass_reports_whether_it_changed_anything() -> None:
    unit = rewrite(graph(f"{HEAD} | a = mm x w | return a"), {"a": "bf16", "a.store": "bf16"})
    assert InsertCasts().run(unit)
    assert not InsertCasts().run(rewrite(graph(f"{HEAD} | a = mm x w | return a"), {}))


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_models_own_narrow_contraction_is_none_of_ours(fmt: str) -> None:
    word = {"bf16": "bf16", "fp16": "f16"}[fmt]
    described = f"{HEAD} | a = cast x {word} | b = mm a a | c = mm x w | return b c"
    module = inserted(described, {"c": "bf16", "c.store": "bf16"})
    by_name = {node.name: node for node in module.graph.nodes}
    assert by_name["b"].args == (by_name["a"], by_name["a"])
