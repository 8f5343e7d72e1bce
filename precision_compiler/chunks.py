"""Cut a graph into chunks that autograd can afford to record one by one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx

from precision_compiler.graph import ATTENTION, is_movement, shape_of, value_of

CHUNKS = 24
"""Chunks a graph is cut into: what one of them saves is what must fit beside the values."""


@dataclass
class Chunk:
    """Consecutive nodes, what they read from before and what is read of them later.

    Attributes:
        nodes: in graph order.
        reads: nodes of earlier chunks, or placeholders.
        saved_bytes: about what autograd keeps of the chunk.
        gives: nodes that later chunks read, or results of the graph, or that are not to be run
            twice.
        leaves, made: inputs and outputs under autograd, while they are kept.
    """

    nodes: list[fx.Node]
    saved_bytes: int
    reads: list[fx.Node] = field(default_factory=list)
    gives: list[fx.Node] = field(default_factory=list)
    leaves: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    made: dict[fx.Node, Any] = field(default_factory=dict)
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


def cut(nodes: Sequence[fx.Node], sizes: Mapping[fx.Node, int], size: int) -> list[Chunk]:
    """Chunks of about ``size`` saved bytes; a tuple of results stays with those who unpack it."""
    place = {node: index for index, node in enumerate(nodes)}
    chunks: list[Chunk] = []
    current: list[fx.Node] = []
    filled, together = 0, -1
    for index, node in enumerate(nodes):
        current.append(node)
        filled += sizes[node]
        if not isinstance(node.meta.get("val"), torch.Tensor):
            together = max([together, *(place.get(user, -1) for user in node.users)])
        if filled >= size and index >= together:
            chunks.append(Chunk(current, filled))
            current, filled = [], 0
    return [*chunks, Chunk(current, filled)] if current else chunks


def affordable(chunks: Sequence[Chunk], memory: float) -> set[int]:
    """The ``id`` of chunks that may keep what autograd saves, the last ones first."""
    kept, used = set(), 0.0
    for chunk in reversed(chunks):
        used += chunk.saved_bytes
        if used > memory:
            break
        kept.add(id(chunk))
    return kept
