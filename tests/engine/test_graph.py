"""Questions about graphs, and the few edits; and the text that tests write graphs in."""

import math

import pytest
import torch
from torch import fx

from precision_compiler.graph import (
    CONTRACTIONS,
    CONVERT,
    Mover,
    aten,
    base_name,
    contraction_depths,
    contraction_rule,
    copied,
    insert_call,
    is_cast,
    is_float32,
    is_movement,
    reached_from,
    root_of,
    shape_of,
    uses_past_movement,
    with_movement,
)
from tests.helpers import graph, text
from tests.models import MODELS, captured

VIEWS = (
    "x:f32[4,8] | a = relu x | b = t a | c = slice b 0 0 4 | d = clone c"
    " | e = neg d | f = unbind.int a 0 | g = getitem f 1 | h = neg g | return e h a"
)


def nodes_of(described: str) -> dict[str, fx.Node]:
    return {node.name: node for node in graph(described).graph.nodes}


@pytest.mark.parametrize("described", [VIEWS, "x:bf16[] | a = cast x f32 | return a none"])
def test_text_is_read_back_as_written(described: str) -> None:
    assert text(graph(described)) == described


def test_backward_nodes_are_marked_in_text() -> None:
    described = "x:f32[4] | a@backward = sum x dtype=f64 | return a"
    module = graph(described)
    assert text(module) == described
    assert nodes_of(described)["a"].meta["partitioner_tag"] == "is_backward"


def test_views_copies_and_parts_of_views_are_movement() -> None:
    nodes = nodes_of(VIEWS)
    assert [name for name, node in nodes.items() if is_movement(node)] == ["b", "c", "d", "f", "g"]
    assert root_of(nodes["d"]) is root_of(nodes["g"]) is nodes["a"]
    assert root_of(nodes["e"]) is nodes["e"]
    assert root_of(nodes["x"]) is nodes["x"]


def test_uses_are_found_past_movement_with_what_they_read_through() -> None:
    nodes = nodes_of(VIEWS)
    assert {node.name for node in with_movement(nodes["a"])} == {"a", "b", "c", "d", "f", "g"}
    found = {(user.name, through.name) for user, through in uses_past_movement(nodes["a"])}
    assert found == {("e", "d"), ("h", "g"), ("output", "a")}


@pytest.mark.parametrize("op", ["relu a", "add a a", "sum a", "cast a bf16", "index_select a 0 i"])
def test_computation_is_no_movement(op: str) -> None:
    nodes = nodes_of(f"a:f32[4,4] i:i64[2] | b = {op} | return b")
    assert not is_movement(nodes["b"])
    assert is_cast(nodes["b"]) == op.startswith("cast")


@pytest.mark.parametrize(
    "op",
    ["expand a [3,4,4]", "permute a [1,0]", "view a [16]", "select.int a 0 1", "unsqueeze a 0"],
)
def test_every_kind_of_view_is_movement(op: str) -> None:
    assert is_movement(nodes_of(f"a:f32[4,4] | b = {op} | return b")["b"])


def test_depth_counts_contractions_on_the_longest_path() -> None:
    nodes = nodes_of(
        "x:f32[4,4] | a = relu x | b = mm a x | c = relu b | d = mm c a | e = add d a | return e"
    )
    depths = contraction_depths(next(iter(nodes.values())).graph)
    assert [depths[nodes[name]] for name in "xabcde"] == [0, 0, 1, 1, 2, 2]


def test_reach_includes_the_start_and_everything_after_it() -> None:
    nodes = nodes_of("x:f32[4] y:f32[4] | a = relu x | b = relu y | c = add a b | return c")
    assert {node.name for node in reached_from([nodes["a"]])} == {"a", "c", "output"}
    assert reached_from([]) == set()


@pytest.mark.parametrize(
    ("described", "flops"),
    [
        ("x:f32[3,5] w:f32[5,7] | a = mm x w | return a", 2 * 3 * 5 * 7),
        ("b:f32[7] x:f32[3,5] w:f32[5,7] | a = addmm b x w | return a", 2 * 3 * 5 * 7),
        ("x:f32[2,3,5] w:f32[2,5,7] | a = bmm x w | return a", 2 * 2 * 3 * 5 * 7),
        (
            "x:f32[2,3,8,8] w:f32[6,3,4,4] b:f32[6]"
            " | a = convolution x w b [4,4] [0,0] [1,1] false [0,0] 1 | return a",
            2 * 2 * 6 * 2 * 2 * 3 * 4 * 4,
        ),
    ],
)
def test_flops_count_multiply_and_add(described: str, flops: int) -> None:
    node = nodes_of(described)["a"]
    rule = contraction_rule(node)
    assert rule is not None
    shapes = [shape_of(node.args[index]) for index in rule.operands]  # type: ignore[arg-type]
    assert rule.flops(shapes, shape_of(node)) == flops


def test_flops_of_attention_are_those_of_its_products() -> None:
    """Two products of length by length by width forward, five backward."""
    batch, heads, queries, keys, width = 2, 3, 5, 7, 8
    query, key = (batch, heads, queries, width), (batch, heads, keys, width)
    product = 2 * math.prod((batch, heads, queries, keys, width))
    by_name = {base_name(op): rule for op, rule in CONTRACTIONS.items()}
    forward = by_name["_scaled_dot_product_flash_attention_for_cpu"]
    backward = by_name["_scaled_dot_product_flash_attention_for_cpu_backward"]
    assert forward.flops([query, key, key], query) == 2 * product
    assert backward.flops([query, query, key, key, query], query) == 5 * product


@pytest.mark.parametrize("name", MODELS)
def test_rules_point_at_tensors_and_real_outputs(name: str) -> None:
    for node in captured(name).joint.module.graph.nodes:
        rule = contraction_rule(node)
        if rule is None:
            continue
        for index in rule.operands:
            assert is_float32(node.args[index])
        value = node.meta["val"]
        assert (rule.outputs is None) == isinstance(value, torch.Tensor)


def test_inserted_call_follows_its_place_and_takes_over_its_origin() -> None:
    module = graph("x:f32[4] y:f32[4] | a@backward = relu x | return a y")
    nodes = {node.name: node for node in module.graph.nodes}
    made = insert_call(
        module.graph, CONVERT, (nodes["a"], torch.bfloat16), after=nodes["a"], like=nodes["a"]
    )
    assert nodes["a"].next is made
    assert made.meta["val"].dtype == torch.bfloat16
    assert made.meta["partitioner_tag"] == "is_backward"
    first = insert_call(
        module.graph, aten.neg.default, (nodes["x"],), after=nodes["x"], like=nodes["x"]
    )
    assert first.prev is nodes["y"]  # placeholders stay together
    module.graph.lint()


def test_mover_repeats_each_chain_once() -> None:
    module = graph("x:f32[4,8] y:f32[4,8] | a = t x | b = slice.Tensor a 0 0 2 | return b y")
    nodes = {node.name: node for node in module.graph.nodes}
    mover = Mover(module.graph)
    moved = mover.moved(nodes["y"], nodes["x"], nodes["b"])
    assert mover.moved(nodes["y"], nodes["x"], nodes["b"]) is moved
    assert root_of(moved) is nodes["y"]
    assert shape_of(moved) == shape_of(nodes["b"])
    assert mover.moved(nodes["y"], nodes["x"], nodes["x"]) is nodes["y"]
    module.graph.lint()


def test_copy_is_a_graph_of_its_own_with_the_same_names() -> None:
    module = graph(VIEWS)
    twin = copied(module)
    assert text(twin) == text(module)
    twin.graph.output_node().args = ((),)
    twin.graph.eliminate_dead_code()
    assert text(module) == VIEWS
