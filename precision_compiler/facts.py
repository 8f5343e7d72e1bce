"""What is known of a node, behind one door: only this file touches ``node.meta["precision"]``."""

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

_KEY = "precision"


@dataclass(frozen=True)
class NodeFacts:
    """What is known of one node.

    Attributes:
        name: the node's stable name, made from module path and operation.
        site: name of the decision that the node carries out, if any.
        reason: why a pass inserted or changed the node; empty for untouched ones.
    """

    name: str
    site: str | None = None
    reason: str = ""


def facts_of(node: fx.Node) -> NodeFacts | None:
    """Return the facts of a node, or None where nothing is known."""
    found = node.meta.get(_KEY)
    return found if isinstance(found, NodeFacts) else None


def set_facts(node: fx.Node, facts: NodeFacts) -> None:
    """Replace the facts of a node."""
    node.meta[_KEY] = facts


def update_facts(node: fx.Node, **changes: Any) -> None:
    """Change some facts of a node that already has them."""
    known = facts_of(node)
    if known is None:
        raise KeyError(f"node {node.name} has no facts to update")
    set_facts(node, replace(known, **changes))
