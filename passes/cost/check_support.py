"""See CheckSupport."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from precision_compiler.formats import CHOICES
from precision_compiler.graph import shape_of
from precision_compiler.lowering.support import reason_against_product
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.scaling import reason_against_recipe
from precision_compiler.sites import operand_nodes


@dataclass(frozen=True)
class CheckSupport:
    """Rule out formats that nothing runs a contraction in.

    1. Scaled formats are for products of two matrices: attention, convolutions and batches of
       products have no kernel that takes scales. tf32 is for products of matrices and batches.
    2. The target's instructions have the format, and a kernel uses them.
    3. In block formats, the length of the sum is a multiple of the block.
    4. Recipes are for products of the roles that they name; rotated ones for sums of whole tiles.
    """

    name: ClassVar[str] = "check-support"
    reads: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    makes: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Add to ``unit.vetoes``."""
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        for site in unit.links.contractions.values():
            for name in unit.target.choices:
                reason = _reason(nodes[site.node], site.role, name, unit.target.architecture)
                if reason:
                    unit.vetoes.setdefault((site.name, name), f"support: {reason}")
        return False


def _reason(node: fx.Node, role: str, fmt: str, architecture: str) -> str:
    reason = reason_against_product(node, fmt, architecture)
    if reason or not CHOICES[fmt].by_axis:
        return reason
    block, length = CHOICES[fmt].block, shape_of(operand_nodes(node)[0])[-1]
    reason = reason_against_recipe(fmt, role, length)
    if reason or not block:
        return reason
    if length % block:
        return f"the sum over {length} elements does not divide into blocks of {block}"
    return ""
