"""See PriceTraffic."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import fx

from precision_compiler.arithmetic import arithmetic_seconds
from precision_compiler.formats import CHOICES
from precision_compiler.fusion import Kernel
from precision_compiler.gemm import quantise_seconds
from precision_compiler.graph import (
    contraction_rule,
    is_matrix_product,
    root_of,
    shape_of,
    value_of,
)
from precision_compiler.origin import origin_of
from precision_compiler.passes.cost.find_kernels import is_fused
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.scaling import suits
from precision_compiler.target import Target


@dataclass(frozen=True)
class PriceTraffic:
    """Price what fused kernels do beside contractions: memory traffic, arithmetic, casts.

    1. A stored tensor is written by the kernel that computes it, unless a contraction writes it
       (its price includes that), and read by every fused kernel that reads it, in its format.
    2. A copy in another format, where a fused kernel makes the tensor, fuses into it: it costs
       its own bytes and no launch. Elsewhere (parameters, inputs, results of contractions) it is
       a kernel of its own: read, write, launch.
    3. A copy in a format with scales costs what quantising costs in the target's model of matrix
       products, which is gauged on published times (``gemm.quantise_seconds``): its kernels, and
       their reads and writes. The first of them joins the kernel that makes the tensor, if there
       is one. Where the hardware multiplies only operands that are contiguous along the sum, and
       where rows or blocks have scales, the copy is written along both axes if its readers sum
       over both. It is read in 16 bits where the tensor is stored (plans with 8-bit operands store
       16), in float32 where it is a parameter or input.
    4. In a graph from an ONNX file no cast fuses. Its weights are cast in the file: that is free.
    5. Formats change nothing about launches, tensors that are no site, and arithmetic, which is
       float32: together they are the fixed time. On this machine arithmetic is timed, operation
       by operation, on tensors that stay in its caches; on others it hides behind the traffic.
    """

    name: ClassVar[str] = "price-traffic"
    reads: ClassVar[frozenset[str]] = frozenset({"kernels"})
    makes: ClassVar[frozenset[str]] = frozenset({"traffic prices"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.store_prices``, ``unit.cast_prices`` and ``unit.fixed_seconds``."""
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        fused = [kernel for kernel in unit.kernels if _is_priced(kernel, nodes)]
        read = Counter(_root(name, nodes) for kernel in fused for name in kernel.reads)
        written = Counter(_root(name, nodes) for kernel in fused for name in kernel.writes)
        stores = {site.node: name for name, site in unit.links.stores.items()}
        unit.store_prices = {
            name: {
                fmt: _seconds(nodes[node], CHOICES[fmt].bytes, read[node], written[node], unit)
                for fmt in unit.formats_for("storage")
            }
            for node, name in stores.items()
        }
        rigid = {
            fmt
            for fmt in unit.target.choices
            if unit.target.rate(fmt).layouts == "tn" or CHOICES[fmt].by_axis
        }
        sources = {link.source for link in unit.links.reads}
        sources |= {unit.links.stores[store].node for store in unit.links.writer}
        layouts = _layouts(unit, nodes)
        unit.cast_prices = {
            source: {
                fmt: 0.0
                if unit.joint.inference and source in unit.joint.parameters
                else cast_seconds(
                    nodes[source],
                    fmt,
                    unit.target,
                    _ways(layouts[source], fmt) if fmt in rigid else 1,
                    stored=source in stores,
                )
                for fmt in unit.target.choices
            }
            for source in sorted(sources)
        }
        others = (set(read) | set(written)) - set(stores)
        unit.fixed_seconds = sum(
            _seconds(nodes[name], None, read[name], written[name], unit)
            for name in others
            if name in nodes
        )
        unit.fixed_seconds += len(fused) * unit.target.launch_seconds
        if unit.target.device == "cpu" and unit.target.machine is not None:
            known = (nodes[name] for kernel in fused for name in kernel.nodes if name in nodes)
            unit.fixed_seconds += arithmetic_seconds(
                [*filter(is_fused, known)], unit.target.machine
            )
        return False


def _is_priced(kernel: Kernel, nodes: Mapping[str, fx.Node]) -> bool:
    """Not the contractions, whose prices include what they read and write.

    A library call without any node of the graph is one that Inductor put in the place of several,
    such as a product and the addition of a bias.
    """
    known = [nodes[name] for name in kernel.nodes if name in nodes]
    return kernel.generated or (bool(known) and not any(map(contraction_rule, known)))


def _root(name: str, nodes: Mapping[str, fx.Node]) -> str:
    return root_of(nodes[name]).name if name in nodes else name


def _seconds(node: fx.Node, width: float | None, reads: int, writes: int, unit: Unit) -> float:
    """Reading and writing a node's tensor so often, with elements of ``width`` bytes."""
    value = value_of(node)
    if value is None:
        return 0.0
    size = prod(shape_of(node)) * (width or value.element_size())
    return reads * unit.target.read_seconds(size) + writes * unit.target.write_seconds(size)


def cast_seconds(
    node: fx.Node, fmt: str, target: Target, layouts: int = 1, *, stored: bool = False
) -> float:
    """Rules 2 and 3: seconds of a copy of a float32 tensor in a format.

    Args:
        node: computes the tensor.
        fmt: the format.
        target: the machine.
        layouts: ways in which the copy must lie in memory, 1 or 2.
        stored: whether the tensor is a storage site.
    """
    elements = prod(shape_of(node))
    joins = is_fused(node) and origin_of(node) is None
    if CHOICES[fmt].scaled:
        by_axis = "block" if CHOICES[fmt].block else "row"
        scaling = by_axis if CHOICES[fmt].by_axis else "tensor"
        width = CHOICES["bf16" if stored else "fp32"].bytes
        return quantise_seconds(
            target, elements, fmt, scaling, twice=layouts > 1, joined=joins, source_bytes=width,
        )  # fmt: skip
    written = target.write_seconds(elements * CHOICES[fmt].bytes)
    if joins:
        return written
    return written + target.read_seconds(elements * CHOICES["fp32"].bytes) + target.launch_seconds


def _ways(readings: Collection[tuple[str, bool]], fmt: str) -> int:
    """Copies that readings (role, whether along rows) ask of a format, one at the least."""
    found = {along for role, along in readings if suits(fmt, role)}
    return max(1, len(found))


def _layouts(unit: Unit, nodes: Mapping[str, fx.Node]) -> dict[str, set[tuple[str, bool]]]:
    """By source, its readings: the product's role, and whether the sum runs along its rows."""
    wanted: dict[str, set[tuple[str, bool]]] = defaultdict(set)
    for link in unit.links.reads:
        site = unit.links.contractions[link.contraction]
        contraction = nodes[site.node]
        argument = contraction.args[link.argument]
        rule = contraction_rule(contraction)
        if rule is None or not isinstance(argument, fx.Node) or not is_matrix_product(contraction):
            continue
        summed = -1 if link.argument == rule.operands[0] else -2
        value = value_of(argument)
        if value is not None and link.argument in rule.operands:
            wanted[link.source].add((site.role, value.stride(summed) == 1))
    return wanted
