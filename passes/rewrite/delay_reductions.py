"""See DelayReductions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.graph import contraction_rule, is_movement, is_view, value_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.verify import is_ours


@dataclass(frozen=True)
class DelayReductions:
    """Let reductions read the narrow tensor that a contraction reads, not what computes it.

    Inductor writes a tensor to memory when it comes to a reader that needs it there; what it
    came to before computes the tensor again from its sources. The sum for a bias's gradient, if
    it comes before the matrix products, would repeat the whole chain, slowly: down the columns,
    element by element on a CPU.

    1. A cast back to float32 that only reductions read, directly or through views and copies,
       moves with them behind the first contraction that reads the same narrow tensor or a view
       of it.
    2. Not where that contraction needs a result of these reductions.
    """

    name: ClassVar[str] = "delay-reductions"
    reads: ClassVar[frozenset[str]] = frozenset({"casts"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Each cast moves once: where it goes it is behind its contraction."""
        changed = False
        for cast in [node for node in unit.joint.module.graph.nodes if _is_for_reductions(node)]:
            contraction = _first_contraction(_base(cast))
            if contraction is None or contraction < cast:
                continue
            group = _readers_before(cast, contraction)
            if contraction not in group:
                _move_behind(contraction, group)
                changed = True
        return changed


def _is_for_reductions(node: fx.Node) -> bool:
    """Whether a node is a cast of ours to a wider dtype that reductions alone read."""
    source = node.args[0] if is_ours(node) else None
    before, after = value_of(source) if isinstance(source, fx.Node) else None, value_of(node)
    if before is None or after is None or before.itemsize >= after.itemsize:
        return False
    readers = list(_past_movement(node))
    return bool(readers) and all(map(_is_reduction, readers))


def _is_reduction(node: fx.Node) -> bool:
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _past_movement(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a node's elements, directly or through views and copies."""
    for user in node.users:
        if is_movement(user):
            yield from _past_movement(user)
        else:
            yield user


def _base(cast: fx.Node) -> fx.Node:
    """The tensor in memory whose view a cast reads."""
    node = cast.args[0]
    assert isinstance(node, fx.Node)
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def _first_contraction(base: fx.Node) -> fx.Node | None:
    """The first contraction that reads a tensor or a view of it."""
    waiting, found = [base], list[fx.Node]()
    while waiting:
        for user in waiting.pop().users:
            if is_view(user):
                waiting.append(user)
            elif contraction_rule(user) is not None:
                found.append(user)
    return min(found, default=None)


def _readers_before(cast: fx.Node, contraction: fx.Node) -> set[fx.Node]:
    """A cast and everything that needs it, up to and including a contraction."""
    waiting, found = [cast], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node not in found and node <= contraction:
            found.add(node)
            waiting.extend(node.users)
    return found


def _move_behind(contraction: fx.Node, group: set[fx.Node]) -> None:
    """Move nodes behind another, in the order they have."""
    for node in sorted(group, reverse=True):
        contraction.append(node)
