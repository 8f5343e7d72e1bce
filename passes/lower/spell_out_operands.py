"""See SpellOutOperands."""

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from precision_compiler import packing
from precision_compiler.lowering.inlining import Inliner
from precision_compiler.pipeline import Numerics, Unit

_FUNCTIONS = (
    packing.tensor_scale,
    packing.tensor_operand,
    packing.block_operand,
    packing.scaled_operand,
    packing.blocked_scales,
    packing.row_scales,
    packing.no_scale,
)


@dataclass(frozen=True)
class SpellOutOperands:
    """Write operands of scaled products in plain ATen operations.

    1. Every call of ``packing`` becomes the operations that it is made of: largest
       magnitudes, scales, rounding, casts. Inductor fuses them into what makes the tensor.
    """

    name: ClassVar[str] = "spell-out-operands"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Replace the calls."""
        graph = unit.joint.module.graph
        inliner = Inliner(graph)
        calls = [node for node in graph.nodes if node.target in _FUNCTIONS]
        for call in calls:
            nodes = tuple(argument for argument in call.args if isinstance(argument, fx.Node))
            results = inliner.inline(call.target, nodes, call.args[len(nodes) :], like=call)
            if isinstance(call.meta["val"], tuple):
                for part in list(call.users):
                    assert part.target is operator.getitem
                    part.replace_all_uses_with(results[part.args[1]])
                    graph.erase_node(part)
            else:
                call.replace_all_uses_with(results[0])
            graph.erase_node(call)
        return bool(calls)
