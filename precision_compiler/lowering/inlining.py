"""Trace a tensor function and put its operations into a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from precision_compiler.graph import insert_call


class Inliner:
    """Puts tensor functions into one graph as the ATen operations that they are made of.

    Each function is traced once per shapes, strides and options of its arguments.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._traced: dict[tuple[object, ...], fx.GraphModule] = {}

    def inline(
        self,
        function: Callable[..., Any],
        args: Sequence[fx.Node],
        options: tuple[object, ...],
        like: fx.Node,
    ) -> list[fx.Node]:
        """Insert ``function(*args, *options)`` behind the last of its arguments.

        Args:
            function: takes the values of ``args``, then ``options``; returns a tensor or a tuple.
            args: nodes of the graph.
            options: hashable further arguments.
            like: the node whose provenance the new nodes get.

        Returns:
            The nodes of its results.
        """
        values = [node.meta["val"] for node in args]
        layout = tuple((value.shape, value.stride(), value.dtype, value.device) for value in values)
        key = (function, layout, options)
        if key not in self._traced:
            self._traced[key] = _trace(function, values, options)
        return self._copied(self._traced[key], args, like)

    def _copied(
        self, traced: fx.GraphModule, args: Sequence[fx.Node], like: fx.Node
    ) -> list[fx.Node]:
        last = max(args)  # nodes compare by their place in the graph
        made = dict(zip(traced.graph.find_nodes(op="placeholder"), args, strict=True))
        for node in traced.graph.nodes:
            if node.op != "call_function":
                continue
            given, named = fx.node.map_arg((node.args, node.kwargs), made.__getitem__)
            value = node.meta["val"]
            last = insert_call(
                self.graph, node.target, given, named, after=last, like=like, value=value
            )
            made[node] = last
        results = traced.graph.output_node().args[0]
        leaves = [results] if isinstance(results, fx.Node) else results
        assert isinstance(leaves, (tuple, list))
        return [made[leaf] for leaf in leaves if isinstance(leaf, fx.Node)]


def _trace(
    function: Callable[..., Any], values: Sequence[Any], options: tuple[object, ...]
) -> fx.GraphModule:
    def call(*given: torch.Tensor) -> Any:
        found = function(*given, *options)
        return found if isinstance(found, torch.Tensor) else tuple(found)

    pure = torch.func.functionalize(call, remove="mutations")
    modes = [value.fake_mode for value in values if isinstance(value, FakeTensor)]
    with modes[0]:
        traced: fx.GraphModule = make_fx(pure, decomposition_table=select_decomp_table())(*values)
    traced.graph.eliminate_dead_code()
    return traced
