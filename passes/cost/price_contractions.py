"""See PriceContractions."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler.formats import CHOICES
from precision_compiler.graph import contraction_rule, is_matrix_product, shape_of, value_of
from precision_compiler.lowering.support import reason_against_product
from precision_compiler.measure import Machine, layout_key, random_like
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.scaled_calls import SCALED_PRODUCTS, scaled_call
from precision_compiler.scaling import hardware_format
from precision_compiler.sites import operand_nodes, output_nodes, rounded_arguments
from precision_compiler.target import Target
from precision_compiler.tf32 import TF32_MATMUL


@dataclass(frozen=True)
class PriceContractions:
    """Price every contraction in every format of the target.

    1. On a target known from its data: a matrix product by the target's model of output tiles,
       waves and traffic (``Target.gemm_seconds``), its casts priced apart; attention and
       convolutions by the slower of arithmetic at the format's achieved rate and traffic of
       operands and result at the achieved bandwidth, plus a launch.
    2. On this machine: the very call (operation, sizes, strides, dtype) is timed, all formats
       in turn, and kept on disk. Matrix products in formats that a square one shows to be slower
       than float32 are not timed, which would take longer than it tells: they cost as many times
       the float32 call as they are slower there. Attention and convolutions have other kernels, of
       which that says nothing: they are timed in all formats. On a GPU products in scaled formats
       are timed as ``aten._scaled_mm`` on operands in the format; quantising them is priced with
       the casts.
    """

    name: ClassVar[str] = "price-contractions"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"contraction prices"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.contraction_prices``."""
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        sites = {name: nodes[site.node] for name, site in unit.links.contractions.items()}
        distinct = {_sizes(node): node for node in sites.values()}  # layers repeat the same few
        known = {
            sizes: {fmt: roofline(node, fmt, unit.target) for fmt in unit.target.choices}
            for sizes, node in distinct.items()
        }
        unit.contraction_prices = {name: known[_sizes(node)] for name, node in sites.items()}
        if unit.target.machine is not None:
            self._measure(unit, unit.target.machine, sites)
        return False

    def _measure(self, unit: Unit, machine: Machine, sites: dict[str, fx.Node]) -> None:
        slowest = machine.matmul_flops["fp32"]
        formats = [name for name, rate in machine.matmul_flops.items() if rate >= slowest]
        keys: dict[tuple[str, str], str] = {}
        cases: dict[str, Callable[[], Any]] = {}
        for name, node in sites.items():
            for fmt in formats if is_matrix_product(node) else machine.matmul_flops:
                found = _case(node, fmt, machine.device)
                if found is not None:
                    keys[name, fmt], case = found
                    cases.setdefault(keys[name, fmt], case)
        known = len(set(cases) & set(machine.cases))
        seconds = machine.seconds(cases)
        slower = {fmt: slowest / rate for fmt, rate in machine.matmul_flops.items()}
        unit.contraction_prices = {
            name: {
                fmt: seconds[keys[name, base]]
                if (name, base) in keys
                else seconds[keys[name, "fp32"]] * slower[base]
                for fmt, base in zip(prices, map(hardware_format, prices), strict=True)
            }
            for name, prices in unit.contraction_prices.items()
        }
        unit.journal.note(
            self.name,
            f"{len(cases)} distinct calls on this machine: {len(cases) - known} timed now, "
            f"{known} known from {machine.path.name}; products not timed, slower than fp32: "
            f"{', '.join(set(machine.matmul_flops) - set(formats)) or 'none'}",
        )


def _sizes(node: fx.Node) -> Hashable:
    """What ``roofline`` asks of a contraction."""
    operands, results = operand_nodes(node), output_nodes(node)
    return node.target, *map(shape_of, operands), "->", *map(shape_of, results)


def roofline(node: fx.Node, fmt: str, target: Target) -> float:
    """Predicted seconds of a contraction with operands in ``fmt`` (rule 1)."""
    rule = contraction_rule(node)
    if rule is None:
        raise ValueError(f"{node.name} is no contraction")
    operands = [shape_of(operand) for operand in operand_nodes(node)]
    results = [shape_of(result) for result in output_nodes(node)]
    if target.units is not None and is_matrix_product(node):
        (*batch, m, k), n = operands[0], operands[1][-1]
        if min(*batch, m, n, k) > 0:
            return target.gemm_seconds(m, n, k, format=fmt, quantise=False, batch=prod(batch))
    width = CHOICES[fmt].bytes
    result_width = width if width >= 2 else 2.0  # narrow formats accumulate into 16 bits
    size = width * sum(map(prod, operands)) + result_width * sum(map(prod, results))
    flops = rule.flops(operands, results[0] if results else ())
    return target.contraction_seconds(flops, size, fmt)


def _case(node: fx.Node, fmt: str, device: str) -> tuple[str, Callable[[], Any]] | None:
    """The call of ``node`` in a format on random tensors, and the text that identifies it.

    None where no kernel computes it in that format.
    """
    dtype, target = CHOICES[fmt].dtype, node.target
    if CHOICES[fmt].scaled:
        return _scaled_case(node, fmt, device)
    if fmt == "tf32":
        if not is_matrix_product(node):
            return None
        dtype, target = torch.float32, TF32_MATMUL
    assert dtype is not None
    rounded = set(rounded_arguments(node).values())

    def like(argument: fx.Node) -> Any:
        value = value_of(argument)
        if value is None:
            return argument.meta["val"]
        own = dtype if argument in rounded else value.dtype
        return value.to(own)

    given = node.args if target is node.target else tuple(operand_nodes(node))
    args = fx.node.map_arg(given, like)
    kwargs = fx.node.map_arg(node.kwargs if target is node.target else {}, like)
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    key = f"{target} {layout_key(leaves)}"
    return key, partial(_LazyCall(target, args, kwargs))


def _scaled_case(node: fx.Node, fmt: str, device: str) -> tuple[str, Callable[[], Any]] | None:
    if fmt not in SCALED_PRODUCTS or reason_against_product(node, fmt, ""):
        return None
    (m, k), n = shape_of(operand_nodes(node)[0]), shape_of(operand_nodes(node)[1])[1]
    made: list[Callable[[], Any]] = []

    def call() -> Any:
        if not made:
            made.append(scaled_call(m, n, k, fmt, device))
        return made[0]()

    return f"scaled {fmt} {m} {n} {k}", call


class _LazyCall:
    """A call whose random tensors are made when it first runs: known cases never make them."""

    def __init__(self, target: Any, args: Any, kwargs: Any) -> None:
        self.target, self.args, self.kwargs = target, args, kwargs
        self.ready = False

    def __call__(self) -> Any:
        if not self.ready:
            fill = partial(torch.utils._pytree.tree_map, _fill)
            self.args, self.kwargs, self.ready = fill(self.args), fill(self.kwargs), True
        return self.target(*self.args, **self.kwargs)


def _fill(value: Any) -> Any:
    return random_like(value, value.dtype) if isinstance(value, torch.Tensor) else value
