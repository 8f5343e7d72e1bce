"""What a legal graph is after each pass; a broken rule is our bug and stops the compilation."""

import torch
from torch import fx

from precision_compiler.errors import VerifyError
from precision_compiler.facts import facts_of
from precision_compiler.graph import contraction_rule, is_cast, value_of
from precision_compiler.sites import rounded_arguments

_NARROW = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)


def result_dtypes(graph: fx.Graph) -> list[torch.dtype | None]:
    """Dtypes of a graph's results, None for absent gradients."""
    results = graph.output_node().args[0]
    assert isinstance(results, (list, tuple))
    values = [value_of(node) if isinstance(node, fx.Node) else None for node in results]
    return [None if value is None else value.dtype for value in values]


def verify_graph(graph: fx.Graph, step: str, results: list[torch.dtype | None]) -> None:
    """Check every rule on a graph that ``step`` has just changed.

    1. Every tensor is known by its fake value.
    2. All rounded arguments of a contraction have one dtype.
    3. No cast of ours goes to the dtype its argument has, and none repeats another.
    4. Reductions read float32 where a cast of ours feeds them.
    5. Forward results and gradients have the user's dtypes.

    Raises:
        VerifyError: names the node and the rule.
    """
    seen: set[tuple[object, object]] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if "val" not in node.meta:
            raise VerifyError(f"after {step}, {node.name} has no fake value")
        _verify_contraction(node, step)
        _verify_reduction(node, step)
        if is_ours(node):
            _verify_cast(node, step, seen)
    found = result_dtypes(graph)
    if found != results:
        wrong = next(
            i for i, pair in enumerate(zip(found, results, strict=True)) if pair[0] != pair[1]
        )
        raise VerifyError(f"after {step}, result {wrong} is {found[wrong]}, not {results[wrong]}")


def is_ours(node: fx.Node) -> bool:
    """Whether a node is a cast that this program inserted."""
    facts = facts_of(node)
    return is_cast(node) and facts is not None and bool(facts.reason)


def _verify_contraction(node: fx.Node, step: str) -> None:
    if contraction_rule(node) is None:
        return
    values = [value_of(argument) for argument in rounded_arguments(node).values()]
    dtypes = {value.dtype for value in values if value is not None}
    if len(dtypes) > 1:
        raise VerifyError(f"after {step}, the operands of {node.name} have dtypes {dtypes}")


def _verify_reduction(node: fx.Node, step: str) -> None:
    if torch.Tag.reduction not in getattr(node.target, "tags", ()):
        return
    for source in node.all_input_nodes:
        value = value_of(source)
        if value is not None and value.dtype in _NARROW and is_ours(source):
            raise VerifyError(f"after {step}, the reduction {node.name} accumulates {value.dtype}")


def _verify_cast(node: fx.Node, step: str, seen: set[tuple[object, object]]) -> None:
    source, dtype = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    value = value_of(source)
    if value is not None and value.dtype == dtype:
        raise VerifyError(f"after {step}, {node.name} casts {source.name} to its own dtype {dtype}")
    if (source, dtype) in seen:
        raise VerifyError(f"after {step}, {node.name} repeats a cast of {source.name} to {dtype}")
    seen.add((source, dtype))
