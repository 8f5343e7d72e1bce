"""See PriceTraffic."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler.formats import FORMATS
from precision_compiler.fusion import Kernel
from precision_compiler.graph import contraction_rule, root_of, shape_of, value_of
from precision_compiler.measure import Machine, layout_key
from precision_compiler.passes.cost.find_kernels import is_fused
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.target import Target

_IN_CACHE = 1 << 13  # elements of a tensor whose arithmetic is timed


@dataclass(frozen=True)
class PriceTraffic:
    """Price what fused kernels do beside contractions: memory traffic, arithmetic, casts.

    1. A stored tensor is written by the kernel that computes it, unless a contraction writes it
       (its price includes that), and read by every fused kernel that reads it, in its format.
    2. A copy in another format, where a fused kernel makes the tensor, fuses into it: it costs
       its own bytes and no launch. Elsewhere (parameters, inputs, results of contractions) it is
       a kernel of its own: read, write, launch.
    3. A format that needs a scale reads the tensor once more, for its amax.
    4. Formats change nothing about launches, tensors that are no site, and arithmetic, which is
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
                fmt: _seconds(nodes[node], FORMATS[fmt].bytes, read[node], written[node], unit)
                for fmt in unit.formats_for("storage")
            }
            for node, name in stores.items()
        }
        sources = {link.source for link in unit.links.reads}
        sources |= {unit.links.stores[store].node for store in unit.links.writer}
        unit.cast_prices = {
            source: {fmt: cast_seconds(nodes[source], fmt, unit.target) for fmt in FORMATS}
            for source in sorted(sources)
        }
        others = (set(read) | set(written)) - set(stores)
        unit.fixed_seconds = sum(
            _seconds(nodes[name], None, read[name], written[name], unit)
            for name in others
            if name in nodes
        )
        unit.fixed_seconds += len(fused) * unit.target.launch_seconds
        if unit.target.machine is not None:
            unit.fixed_seconds += _arithmetic(fused, nodes, unit.target.machine)
        return False


def _is_priced(kernel: Kernel, nodes: Mapping[str, fx.Node]) -> bool:
    """Not the contractions, whose prices include what they read and write."""
    known = (nodes[name] for name in kernel.nodes if name in nodes)
    return kernel.generated or not any(map(contraction_rule, known))


def _root(name: str, nodes: Mapping[str, fx.Node]) -> str:
    return root_of(nodes[name]).name if name in nodes else name


def _seconds(node: fx.Node, width: float | None, reads: int, writes: int, unit: Unit) -> float:
    """Reading and writing a node's tensor so often, with elements of ``width`` bytes."""
    value = value_of(node)
    if value is None:
        return 0.0
    size = prod(shape_of(node)) * (width or value.element_size())
    return reads * unit.target.read_seconds(size) + writes * unit.target.write_seconds(size)


def cast_seconds(node: fx.Node, fmt: str, target: Target) -> float:
    """Rules 2 and 3: seconds of a copy of a float32 tensor in a format."""
    elements = prod(shape_of(node))
    seconds = target.write_seconds(elements * FORMATS[fmt].bytes)
    whole = target.read_seconds(elements * FORMATS["fp32"].bytes)
    if FORMATS[fmt].scaled:
        seconds += whole
    return seconds if is_fused(node) else seconds + whole + target.launch_seconds


def _arithmetic(kernels: Iterable[Kernel], nodes: Mapping[str, fx.Node], machine: Machine) -> float:
    """Seconds of the kernels' arithmetic: per operation, beyond what memory takes anyway."""
    computed = [nodes[name] for kernel in kernels for name in kernel.nodes if name in nodes]
    computed = [node for node in computed if is_fused(node)]
    cases: dict[str, Callable[[], Any]] = {}
    keys: dict[fx.Node, str] = {}
    for node in computed:
        keys[node], case = _case_in_cache(node)
        cases.setdefault(keys[node], case)
    idle = torch.ones(_IN_CACHE)
    cases["nothing but memory"] = idle.neg
    seconds = machine.seconds(cases)
    least = seconds["nothing but memory"]
    return sum(
        max(0.0, seconds[keys[node]] - least) * _elements(node) / _IN_CACHE for node in computed
    )


def _elements(node: fx.Node) -> int:
    """Elements that an operation works through: of its result, or of what it reduces."""
    return max([prod(shape_of(node)), *(prod(shape_of(s)) for s in node.all_input_nodes)])


def _case_in_cache(node: fx.Node) -> tuple[str, Callable[[], Any]]:
    """The operation on small tensors of the same dtypes, and the text that identifies it."""

    def small(argument: fx.Node) -> Any:
        value = value_of(argument)
        if value is None or value.dim() == 0:
            return argument.meta["val"] if value is None else torch.ones((), dtype=value.dtype)
        return torch.ones(_IN_CACHE, dtype=value.dtype)

    if torch.Tag.reduction in getattr(node.target, "tags", ()):
        row = torch.ones(1, _IN_CACHE)
        return "sum of rows in cache", partial(row.sum, -1)
    args = fx.node.map_arg(node.args, small)
    kwargs = fx.node.map_arg(node.kwargs, small)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    assert callable(node.target)
    return f"{node.target} in cache {layout_key(leaves)}", partial(node.target, *args, **kwargs)
