"""Cut a graph into chunks that autograd can afford to record one by one."""

import itertools
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod

import torch
from torch import fx
from torch.autograd.graph import GradientEdge

from precision_compiler.graph import (
    ATTENTION,
    is_movement,
    reached_from,
    root_of,
    shape_of,
    value_of,
)

CHUNKS = 24
"""Chunks a graph is cut into, at the most: what one of them saves must fit beside the values."""


@dataclass
class Chunk:
    """Consecutive nodes, what they read from before and what is read of them later.

    Attributes:
        nodes: in graph order.
        reads: nodes of earlier chunks, or placeholders.
        saved_bytes: about what autograd keeps of the chunk.
        gives: nodes that later chunks read, or results of the graph, or that are not to be run
            twice.
        leaves, made: inputs under autograd, and the places of outputs in its graph, while they are
            kept.
        constants: what is differentiated by too, though it depends on no leaf.
    """

    nodes: list[fx.Node]
    saved_bytes: int
    reads: list[fx.Node] = field(default_factory=list)
    gives: list[fx.Node] = field(default_factory=list)
    leaves: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    made: dict[fx.Node, GradientEdge] = field(default_factory=dict)
    constants: list[torch.Tensor] = field(default_factory=list)


def saved_bytes(node: fx.Node) -> int:
    """About what autograd keeps of one node: its result; of attention, its probabilities too."""
    value = value_of(node)
    if node.target in ATTENTION:
        batch, heads, length, _ = shape_of(node.args[0])  # type: ignore[arg-type]
        other = shape_of(node.args[1])[-2]  # type: ignore[arg-type]
        return 4 * 4 * batch * heads * length * other
    if value is None or node.op != "call_function" or is_movement(node):
        return 0
    return prod(shape_of(node)) * value.element_size()


def phases(
    steps: Sequence[fx.Node], results: Sequence[fx.Node], tangents: Sequence[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """What the forward results need; and the rest, which may wait for tangents.

    Of the rest, what depends on no tangent is put right before its first reader: its value is
    then not kept while everything else runs.

    Args:
        steps: nodes in graph order.
        results: forward results.
        tangents: placeholders of the gradients of the results.
    """
    if not tangents:
        return list(steps), []
    late, needed = reached_from(tangents), set(results)
    for node in reversed(steps):
        if node in needed:
            needed.update(node.all_input_nodes)
            needed.update(() if _is_tensor(node) else node.users)  # a tuple is unpacked at once
    forward = [node for node in steps if node in needed and node not in late]
    first, place = set(forward), {node: index for index, node in enumerate(steps)}
    rest = [node for node in steps if node not in first]
    due: dict[fx.Node, int] = {}
    for node in reversed(rest):
        readers = [due[user] for user in node.users if user in due]
        due[node] = place[node] if node in late else min(readers, default=len(steps))
        if node not in late and not _is_tensor(node):
            due.update(dict.fromkeys(node.users, due[node]))
    return forward, sorted(rest, key=lambda node: (due[node], node in late, place[node]))


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


@dataclass(frozen=True)
class Phase:
    """Nodes in the order they run, to be cut into chunks.

    Attributes:
        nodes: a tuple of results is unpacked within it.
        given: nodes whose values are kept in any case.
        sizes: about what autograd saves of each node, bytes.
    """

    nodes: Sequence[fx.Node]
    given: Collection[fx.Node]
    sizes: Mapping[fx.Node, int]

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        """Of everything computed that is not kept anyway: its place, its last reader's, bytes."""
        last: dict[fx.Node, int] = {}
        for node in self.nodes:
            root = root_of(node)
            if root in self._place:
                uses = [self._place[user] for user in node.users if user in self._place]
                last[root] = max([last.get(root, 0), self._place[node], *uses])
        kept = {root_of(node) for node in self.given}
        found = last.items()
        return [(self._place[r], end, self.sizes[r]) for r, end in found if r not in kept]

    @cached_property
    def crossing(self) -> list[int]:
        """After every node, bytes that were computed and are still read, unless kept anyway."""
        change = [0] * (len(self.nodes) + 1)
        for place, end, size in self._spans:
            change[place] += size
            change[end] -= size
        return list(itertools.accumulate(change))[: len(self.nodes)]

    def cut(self, size: int) -> list[Chunk]:
        """Cut where few values cross, so that little has to be kept from chunk to chunk.

        Args:
            size: what autograd saves of a chunk, bytes, at the least; up to three times that if it
                crosses less.
        """
        chunks: list[Chunk] = []
        start = 0
        while start < len(self.nodes):
            filled, best = 0, -1
            for index in range(start, len(self.nodes)):
                filled += self.sizes[self.nodes[index]]
                if best >= 0 and filled > 3 * size:
                    break
                at_end = index == len(self.nodes) - 1
                if at_end or (filled >= size and self._whole[index]):
                    fewer = best < 0 or self.crossing[index] <= self.crossing[best]
                    best = index if fewer else best
            chosen = list(self.nodes[start : best + 1])
            chunks.append(Chunk(chosen, sum(self.sizes[node] for node in chosen)))
            start = best + 1
        return chunks

    def between(self, chunks: Sequence[Chunk]) -> int:
        """Bytes that cross from chunk to chunk, each tensor counted once."""
        ends = list(itertools.accumulate(len(chunk.nodes) for chunk in chunks))
        chunk_of = partial(bisect_right, ends)
        return sum(size for place, end, size in self._spans if chunk_of(place) != chunk_of(end))

    @cached_property
    def _place(self) -> dict[fx.Node, int]:
        return {node: index for index, node in enumerate(self.nodes)}

    @cached_property
    def _whole(self) -> list[bool]:
        """After every node, whether all tuples of results have been unpacked."""
        found, together = [], -1
        for index, node in enumerate(self.nodes):
            if not _is_tensor(node):
                together = max([together, *(self._place.get(user, -1) for user in node.users)])
            found.append(index >= together)
        return found


def frugal(parts: Sequence[Phase], size: int, largest: int) -> list[list[Chunk]]:
    """Chunks of every phase, of a size that asks for little memory.

    That is what one chunk saves and values that cross from chunk to chunk, together.

    Args:
        parts: the phases.
        size: about what autograd saves of all nodes, bytes.
        largest: of one node.
    """

    def needed(made: Sequence[Sequence[Chunk]]) -> int:
        crossing = sum(phase.between(chunks) for phase, chunks in zip(parts, made, strict=True))
        saved = [chunk.saved_bytes for chunks in made for chunk in chunks]
        return crossing + max(saved, default=0)

    counts = (CHUNKS, CHUNKS // 2, CHUNKS // 4, CHUNKS // 8)
    sizes = [max(1, size // count, largest) for count in counts]
    return min(([phase.cut(size) for phase in parts] for size in sizes), key=needed)


def affordable(chunks: Sequence[Chunk], memory: float) -> set[int]:
    """The ``id`` of chunks that may keep what autograd saves, the last ones first."""
    kept, used = set(), 0.0
    for chunk in reversed(chunks):
        used += chunk.saved_bytes
        if used > memory:
            break
        kept.add(id(chunk))
    return kept
