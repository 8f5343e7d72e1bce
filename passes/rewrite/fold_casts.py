"""See FoldCasts."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.graph import is_cast, value_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.verify import is_ours


@dataclass(frozen=True)
class FoldCasts:
    """Remove casts that change nothing.

    1. A cast to the dtype its argument has is its argument.
    2. A second cast of one tensor to one dtype is the first.
    3. Widening by a cast of ours followed by the model's own cast back to the narrow dtype is the
       narrow tensor: every bf16 and fp16 number is a float32 number.
    """

    name: ClassVar[str] = "fold-casts"
    reads: ClassVar[frozenset[str]] = frozenset({"casts"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """One sweep in graph order is enough: each rule looks backwards only."""
        graph = unit.joint.module.graph
        first: dict[tuple[fx.Node, object], fx.Node] = {}
        changed = False
        for node in list(graph.nodes):
            if not is_cast(node):
                continue
            same = _same_as(node, first)
            if same is not None:
                node.replace_all_uses_with(same)
                graph.erase_node(node)
                changed = True
        return changed


def _same_as(node: fx.Node, first: dict[tuple[fx.Node, object], fx.Node]) -> fx.Node | None:
    source, dtype = node.args[0], node.args[1]
    assert isinstance(source, fx.Node)
    assert isinstance(dtype, torch.dtype)
    value = value_of(source)
    if is_ours(node) and value is not None and value.dtype == dtype:
        return source
    if is_ours(source):
        origin = source.args[0]
        assert isinstance(origin, fx.Node)
        narrow = value_of(origin)
        back = narrow is not None and narrow.dtype == dtype
        if back and value is not None and value.itemsize > dtype.itemsize:
            return origin
    known = first.setdefault((source, dtype), node)
    return known if known is not node and is_ours(node) else None
