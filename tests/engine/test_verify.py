"""Every rule of a legal graph, broken by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from precision_compiler.errors import VerifyError
from precision_compiler.facts import NodeFacts, set_facts
from precision_compiler.verify import is_ours, result_dtypes, verify_graph
from tests.helpers import graph

LEGAL = (
    "x:f32[8,8] w:f32[8,8] | h = cast x bf16 | v = cast w bf16 | a = mm h v | b = cast a f32"
    " | s = sum b | c = relu b | return b s c"
)


def legal() -> tuple[fx.Graph, dict[str, fx.Node]]:
    module = graph(LEGAL)
    nodes = {node.name: node for node in module.graph.nodes}
    for name in ("h", "v", "b"):
        set_facts(nodes[name], NodeFacts(name, reason="a test's"))
    return module.graph, nodes


def no_value(nodes: dict[str, fx.Node]) -> None:
    del nodes["a"].meta["val"]


def mixed(nodes: dict[str, fx.Node]) -> None:
    nodes["a"].update_arg(1, nodes["w"])


def idle(nodes: dict[str, fx.Node]) -> None:
    nodes["b"].update_arg(1, torch.bfloat16)


def repeated(nodes: dict[str, fx.Node]) -> None:
    nodes["v"].update_arg(0, nodes["x"])


def narrow_sum(nodes: dict[str, fx.Node]) -> None:
    nodes["s"].update_arg(0, nodes["h"])


def narrow_result(nodes: dict[str, fx.Node]) -> None:
    nodes["c"].meta["val"] = nodes["a"].meta["val"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (no_value, "a has no fake value"),
        (mixed, "the operands of a have dtypes"),
        (idle, "b casts a to its own dtype torch.bfloat16"),
        (repeated, "v repeats a cast of x to torch.bfloat16"),
        (narrow_sum, "the reduction s accumulates torch.bfloat16"),
        (narrow_result, "result 2 is torch.bfloat16, not torch.float32"),
    ],
)
def test_broken_rule_is_named_with_its_node_and_pass(
    break_it: Callable[[dict[str, fx.Node]], None], message: str
) -> None:
    whole, nodes = legal()
    results = result_dtypes(whole)
    verify_graph(whole, "fold-casts", results)
    break_it(nodes)
    with pytest.raises(VerifyError, match=message) as caught:
        verify_graph(whole, "fold-casts", results)
    assert str(caught.value).startswith("after fold-casts, ")
    assert "\n" not in str(caught.value)


def test_models_own_casts_are_free() -> None:
    """Idle or repeated casts and narrow sums that the user wrote are the user's."""
    module = graph(
        "x:f32[8] n:bf16[8] | a = cast x bf16 | b = cast x bf16 | c = cast n bf16 | s = sum a"
        " | return a b c s"
    )
    assert not any(is_ours(node) for node in module.graph.nodes)
    verify_graph(module.graph, "a pass", result_dtypes(module.graph))


def test_absent_gradients_have_no_dtype() -> None:
    module = graph("x:f32[8] i:i64[2] | a = relu x | return a none i")
    assert result_dtypes(module.graph) == [torch.float32, None, torch.int64]


def test_node_with_a_name_but_no_reason_is_the_models() -> None:
    module = graph("x:f32[8] | a = cast x bf16 | return a")
    node = next(node for node in module.graph.nodes if node.name == "a")
    set_facts(node, NodeFacts("a"))
    assert not is_ours(node)
    set_facts(node, NodeFacts("a", reason="storage format"))
    assert is_ours(node)
