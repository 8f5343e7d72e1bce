"""Tell operations that only move bits: what they make is rounded where their sources are."""

import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from precision_compiler.graph import contraction_rule, is_movement
from precision_compiler.sampling import sampled

_LONGEST_CONE = 12  # operations; what computes more than this does not just move bits
_LOOKED_UP, _FEW = 256, 4  # elements looked up to tell whether bits were only moved
_SIGNIFICANDS, _PART = 1 << 23, 1 << 18
_BELOW_BF16 = 0xFFFF  # the bits of a float32 significand that bf16 does not have


@dataclass(frozen=True)
class Cone:
    """What operations on single elements compute a stored tensor from.

    Attributes:
        sources: the stored tensors.
        aligned: the sources as the operations read them, past views, where an element of the
            result can only come from the same place in them; empty if it may come from anywhere.
    """

    sources: tuple[fx.Node, ...]
    aligned: tuple[fx.Node, ...]

    def is_exact(self, result: torch.Tensor, values: Callable[[fx.Node], torch.Tensor]) -> bool:
        """Whether the elements of a result have the significant bits of elements of the sources.

        Then they were moved, negated, selected or scaled by powers of two, and rounding the
        sources rounds them. Numbers that bf16 has, such as those of masks, are on every grid.
        """
        if self.aligned:
            return _same_places(result, list(map(values, self.aligned)))
        return _anywhere(result, list(map(values, self.sources)))

    @property
    def reads(self) -> tuple[fx.Node, ...]:
        """The nodes whose values the question needs."""
        return self.aligned or self.sources


def cone_of(node: fx.Node, stored: Collection[fx.Node]) -> Cone | None:
    """The cone of a stored tensor.

    Args:
        node: what computes it.
        stored: all nodes whose tensors are stored.

    Returns:
        Nothing if the operations are too many to be moving bits, or none.
    """
    if not _is_elementwise(node):
        return None
    sources: dict[fx.Node, None] = {}
    seen, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in stored:
                sources[source] = None
            elif source not in seen and (is_movement(source) or _is_elementwise(source)):
                seen.add(source)
                waiting.append(source)
        if len(seen) > _LONGEST_CONE:
            return None
    return Cone(tuple(sources), _aligned(node, stored)) if sources else None


def _aligned(node: fx.Node, stored: Collection[fx.Node]) -> tuple[fx.Node, ...]:
    """What pointwise operations read of stored tensors; nothing if other operations take part."""
    found: dict[fx.Node, None] = {}
    waiting = [node]
    while waiting:
        inner = waiting.pop()
        if torch.Tag.pointwise not in getattr(inner.target, "tags", ()):
            return ()
        for source in inner.all_input_nodes:
            root = source
            while root not in stored and is_movement(root):
                root = root.all_input_nodes[0]
            if root in stored:
                found[source] = None
            elif _is_elementwise(root):
                waiting.append(source)  # a view of what was computed is not pointwise
    return tuple(found)


def _is_elementwise(node: fx.Node) -> bool:
    """Whether a node's elements may be those of its arguments, moved or changed one by one."""
    if node.target is operator.getitem:
        return _is_elementwise(node.all_input_nodes[0])
    if node.op != "call_function" or contraction_rule(node) is not None:
        return False
    tags = getattr(node.target, "tags", ())
    return not {torch.Tag.reduction, torch.Tag.nondeterministic_seeded} & set(tags)


def _same_places(result: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
    """Whether a sample of the result has the bits of the same elements of one of the sources."""
    row = _significands(sampled(result, _LOOKED_UP))
    found = row.bitwise_and(_BELOW_BF16) == 0
    for source in sources:
        found |= row == _significands(sampled(source.expand(result.shape), _LOOKED_UP))
    return bool(found.all())


def _anywhere(result: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
    """Whether a sample of the result has bits that occur in the sources.

    Looked up for a few elements first, since most tensors fail there; any operation that computes
    gives new bits.
    """
    row = _significands(sampled(result, _LOOKED_UP))
    row = row[row.bitwise_and(_BELOW_BF16) != 0]
    if not len(row):
        return True
    for bits in row[:: -(-len(row) // _FEW)]:
        if not any(bool((part == bits).any()) for source in sources for part in _parts(source)):
            return False
    sought = torch.zeros(_SIGNIFICANDS, dtype=torch.bool, device=row.device)
    sought[row] = True
    for source in sources:
        for part in _parts(source):
            sought[part] = False
    return not bool(sought[row].any())


def _parts(source: torch.Tensor) -> Iterator[torch.Tensor]:
    """The significands of a tensor, some at a time: whole copies of it would be slow to make."""
    for part in torch.split(source.detach().reshape(-1), _PART):
        yield _significands(part)


def _significands(row: torch.Tensor) -> torch.Tensor:
    return row.view(torch.int32).bitwise_and(_SIGNIFICANDS - 1)
