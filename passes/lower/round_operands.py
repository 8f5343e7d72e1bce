"""See RoundOperands."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.facts import NodeFacts, facts_of, set_facts, update_facts
from precision_compiler.formats import FORMATS, format_named, power_of_two, round_to
from precision_compiler.graph import Mover, contraction_rule, insert_call, root_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import fixes_result
from precision_compiler.sites import named_nodes, rounded_arguments


@torch.library.custom_op("precision_compiler::round_operand", mutates_args=())
def round_operand(x: torch.Tensor, name: str) -> torch.Tensor:
    """Round a tensor to a format and return it in its own dtype.

    A scaled format is scaled by the power of two that brings the tensor's amax just below the
    format's largest number; the scale is taken out again, both exactly.
    """
    fmt = format_named(name)
    if not fmt.scaled or not x.any():
        return round_to(x, fmt)
    amax = x.abs().amax()
    _, exponent = torch.frexp(fmt.max_finite / amax.double())
    scale = power_of_two(exponent - 1)
    return (round_to(x.double() * scale, fmt, saturate=True) / scale).to(x.dtype)


@round_operand.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


ROUND_OPERAND = torch.ops.precision_compiler.round_operand.default


@dataclass(frozen=True)
class RoundOperands:
    """Emulate contraction formats that torch cannot multiply as a plain dtype.

    1. tf32, e4m3 and e5m2 contractions get operands rounded exactly to their format, each
       (tensor, format) once, and accumulate in float32. This has the numerics of a tensor core
       with float32 accumulation and the speed of float32: it is for trying a plan, not for pace.
    2. Small companions (biases) stay float32, as in hardware.
    """

    name: ClassVar[str] = "round-operands"
    reads: ClassVar[frozenset[str]] = frozenset({"assignment", "casts"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Round the operands of every such contraction."""
        graph = unit.joint.module.graph
        mover = Mover(graph)
        rounded: dict[tuple[fx.Node, str], fx.Node] = {}
        for name, node in named_nodes(graph).items():
            fmt = unit.assignment.get(name, "fp32")
            rule = contraction_rule(node)
            if rule is None or fmt == "fp32" or fixes_result(fmt):
                continue
            update_facts(node, site=name, reason=f"operands rounded to {fmt}, emulated")
            for index in rule.operands:
                argument = rounded_arguments(node)[index]
                root = root_of(argument)
                if root.target is ROUND_OPERAND:  # rounded already
                    continue
                copy = rounded.get((root, fmt)) or _rounded(graph, root, fmt)
                rounded[root, fmt] = copy
                node.update_arg(index, mover.moved(copy, root, argument))
        if rounded:
            formats = sorted({fmt for _, fmt in rounded}, key=list(FORMATS).index)
            unit.journal.note(self.name, f"emulated here, at float32 speed: {', '.join(formats)}")
        return bool(rounded)


def _rounded(graph: fx.Graph, root: fx.Node, fmt: str) -> fx.Node:
    node = insert_call(graph, ROUND_OPERAND, (root, fmt), after=root, like=root)
    facts = facts_of(root)
    set_facts(node, NodeFacts(f"{facts.name if facts else root.name}.to_{fmt}", None, "emulation"))
    return node
