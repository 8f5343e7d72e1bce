"""What every node of an exported model says about itself."""

from collections.abc import Mapping

from torch import fx

from precision_compiler.emulation import QUANTISE
from precision_compiler.export.plan_metadata import PREFIX
from precision_compiler.facts import facts_of
from precision_compiler.formats import CHOICES, scale_exponent
from precision_compiler.graph import root_of
from precision_compiler.plan import NodeChoice, Plan
from precision_compiler.record import node_choices


def annotations_of(graph: fx.Graph, plan: Plan) -> dict[str, dict[str, str]]:
    """Entries for every computing node of a rewritten graph, by its fx name."""
    nodes = [node for node in graph.nodes if node.op == "call_function"]
    choices = node_choices(graph, plan.sites)
    return {
        node.name: _annotation(node, choice) for node, choice in zip(nodes, choices, strict=True)
    }


def node_entries(choice: NodeChoice, shows: str | None = None) -> dict[str, str]:
    """Entries of a node.

    Args:
        choice: what was decided for it.
        shows: stable name of the node whose elements it shows, if it only moves them.
    """
    words = {
        "node": choice.name,
        "compute_format": choice.compute_format,
        "storage_format": choice.storage_format,
        "reason": choice.reason,
        "predicted_seconds": f"{choice.seconds:.4g}",
        "predicted_error": f"{choice.error:.4g}",
    }
    if choice.site is not None:
        words["site"] = choice.site
    if shows is not None:
        words["shows"] = shows
    return _prefixed(words)


def _prefixed(words: Mapping[str, str]) -> dict[str, str]:
    return {f"{PREFIX}{key}": value for key, value in words.items()}


def _annotation(node: fx.Node, choice: NodeChoice) -> dict[str, str]:
    owner = facts_of(root_of(node))
    shows = owner.name if owner is not None and owner.name != choice.name else None
    rounding = _prefixed(_rounding(node)) if node.target is QUANTISE else {}
    return node_entries(choice, shows) | rounding


def _rounding(node: fx.Node) -> dict[str, str]:
    """What a node that rounds operands says, its scale included."""
    _, name, *rest = node.args
    fmt = CHOICES[str(name)]
    words = {"storage_format": fmt.name, "reason": f"operand rounded to {fmt.name}"}
    if fmt.by_axis and not fmt.block:
        return words | {"scale": "of rows, from their largest magnitude"}
    if fmt.block:
        return words | {"scale": f"of {fmt.block} elements, from their largest magnitude"}
    amax = rest[1]
    assert isinstance(amax, float)
    origin = f"fixed, from the largest magnitude on the export batch, {amax:.6g}"
    return words | {"scale": f"2^{-scale_exponent(amax, fmt)}, {origin}"}
