"""See CheckSupport."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from precision_compiler.formats import CHOICES
from precision_compiler.graph import is_matrix_product, shape_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.sites import operand_nodes


@dataclass(frozen=True)
class CheckSupport:
    """Rule out formats that the target's hardware cannot run a contraction in.

    1. Scales per block are for products of matrices: attention and convolutions have none.
    2. The length of the sum is a multiple of the block.
    """

    name: ClassVar[str] = "check-support"
    reads: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    makes: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Add to ``unit.vetoes``."""
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        blocks = [name for name in unit.target.formats if CHOICES[name].block]
        for site in unit.links.contractions.values():
            for name in blocks:
                for reason in _reasons(nodes[site.node], CHOICES[name].block):
                    unit.vetoes.setdefault((site.name, name), f"support: {reason}")
        return False


def _reasons(node: fx.Node, block: int) -> Iterator[str]:
    if not is_matrix_product(node):
        yield "scales per block are for products of matrices alone"
        return
    length = shape_of(operand_nodes(node)[0])[-1]
    if length % block:
        yield f"the sum over {length} elements does not divide into blocks of {block}"
