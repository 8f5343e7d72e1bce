"""Casts between bf16 and fp16 by way of float32, as CPUs can do them many at a time."""

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from precision_compiler.graph import CONVERT, insert_call, is_cast, value_of

_HALVES = {torch.bfloat16, torch.float16}


def split_casts(graph: fx.Graph) -> bool:
    """Make every cast between bf16 and fp16 two casts: to float32, which is exact, and from it.

    Inductor converts one into the other element by element on a CPU, which takes about four times
    as long as its vectorised conversions from and to float32.

    Args:
        graph: changed in place.

    Returns:
        Whether it changed.
    """
    changed = False
    for node in [node for node in graph.nodes if is_cast(node)]:
        source = node.args[0]
        value = value_of(source) if isinstance(source, fx.Node) else None
        if value is None or {value.dtype, node.args[1]} != _HALVES:
            continue
        wide = insert_call(graph, CONVERT, (source, torch.float32), after=node.prev, like=node)
        node.args = (wide, *node.args[1:])
        changed = True
    return changed


class SplitCasts(CustomGraphPass):
    """``split_casts`` where Inductor is done with the joint graph: earlier, it joins the two."""

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        split_casts(graph)

    def uuid(self) -> str:
        """Inductor's caches stay valid as long as this does the same."""
        return f"{__name__} 1"
