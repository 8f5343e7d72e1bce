"""See PriceTraffic."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.formats import FORMATS
from precision_compiler.graph import (
    contraction_depths,
    contraction_rule,
    is_movement,
    shape_of,
    uses_past_movement,
)
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.target import Target


@dataclass(frozen=True)
class PriceTraffic:
    """Price the memory traffic of stored tensors, and the casts between formats.

    1. A stored tensor is written once, by the fused kernel that computes it, unless a
       contraction writes it (its price includes that), and read once by every group of fused
       consumers: those of the forward and those of the backward pass at each contraction depth.
    2. A copy in another format, where a pointwise kernel makes the tensor, fuses into it: it
       costs its own bytes and no launch. Elsewhere (parameters, inputs, results of contractions)
       it is a kernel of its own: read, write, launch.
    3. A format that needs a scale reads the tensor once more, for its amax.
    """

    name: ClassVar[str] = "price-traffic"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"traffic prices"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.store_prices`` and ``unit.cast_prices``."""
        graph = unit.joint.module.graph
        nodes = {node.name: node for node in graph.nodes}
        depths = contraction_depths(graph)
        unit.store_prices = {
            name: {
                fmt: store_seconds(nodes[site.node], fmt, unit.target, depths)
                for fmt in unit.formats_for("storage")
            }
            for name, site in unit.links.stores.items()
        }
        sources = {link.source for link in unit.links.reads}
        sources |= {unit.links.stores[store].node for store in unit.links.writer}
        unit.cast_prices = {
            source: {fmt: cast_seconds(nodes[source], fmt, unit.target) for fmt in FORMATS}
            for source in sorted(sources)
        }
        return False


def store_seconds(node: fx.Node, fmt: str, target: Target, depths: Mapping[fx.Node, int]) -> float:
    """Rule 1: seconds of writing and reading a stored tensor in a format."""
    readers = {
        (user.meta.get("partitioner_tag"), depths[user])
        for user, _ in uses_past_movement(node)
        if contraction_rule(user) is None and user.op == "call_function"
    }
    passes = len(readers) + fuses(node)
    return target.stream_seconds(prod(shape_of(node)) * FORMATS[fmt].bytes * passes)


def cast_seconds(node: fx.Node, fmt: str, target: Target) -> float:
    """Rules 2 and 3: seconds of a copy of a float32 tensor in a format."""
    elements = prod(shape_of(node))
    size = elements * FORMATS[fmt].bytes
    if FORMATS[fmt].scaled:
        size += elements * FORMATS["fp32"].bytes
    if fuses(node):
        return target.stream_seconds(size)
    return target.stream_seconds(size + elements * FORMATS["fp32"].bytes) + target.launch_seconds


def fuses(node: fx.Node) -> bool:
    """Whether Inductor generates the kernel that computes a node, so that a cast joins it."""
    if node.op != "call_function" or contraction_rule(node) is not None or is_movement(node):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags
