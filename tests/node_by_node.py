"""Compares an exported ONNX file with the fx graph it comes from, one fx node at a time.

Every group of ONNX nodes that comes from one fx node is cut out, fed what the fx graph computes,
and its result compared with the fx node's: errors cannot add up, and none can hide behind another.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir import convenience
from torch import Tensor, fx

from precision_compiler.emulation import QUANTISE
from precision_compiler.export.onnx_emulation import run_file
from precision_compiler.export.onnx_tidy import ORIGIN


@dataclass(frozen=True)
class Compared:
    """One fx node's value: by torch, by the file, and with the same operands in float64.

    ``operations`` is the number of ONNX nodes that make it.
    """

    node: fx.Node
    wanted: Tensor
    found: Tensor
    exact: Tensor
    operations: int


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node computes, and would compute in float64."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}
        self.exact: dict[str, Any] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        made = super().call_function(target, args, kwargs)
        wide = torch.utils._pytree.tree_map(_widened, (args, kwargs))
        self.last = made if target is QUANTISE else super().call_function(target, *wide)
        return made

    def run_node(self, n: fx.Node) -> Any:
        self.last = None
        self.seen[n.name] = super().run_node(n)
        self.exact[n.name] = self.last
        return self.seen[n.name]


def _widened(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floats else value


def compared(
    path: Path, module: fx.GraphModule, values: list[Any], inputs: dict[str, Tensor]
) -> Iterator[Compared]:
    """Every fx node that has ONNX nodes, in the file's order.

    Args:
        path: the ONNX file.
        module: the graph that was exported.
        values: of its placeholders.
        inputs: values of the ONNX model's inputs, by name.
    """
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*values)
    nodes = {node.name: node for node in module.graph.nodes}
    graph = ir.load(path).graph
    groups: dict[str, list[ir.Node]] = defaultdict(list)
    for node in graph:
        origin = node.metadata_props[ORIGIN]
        groups[origin if origin in nodes else str(node.name)].append(node)
    known = {value: inputs[str(value.name)] for value in graph.inputs}
    for origin, group in groups.items():
        made = _run(graph, group, known, path.with_name("part.onnx"))
        for value, found in made.items():
            if origin not in nodes:  # a helper of the exporter's
                known[value] = found
                continue
            known[value], exact = _same_as(found, recorder.seen[origin], recorder.exact[origin])
            yield Compared(nodes[origin], known[value], found, exact, len(group))


def _run(
    graph: ir.Graph, group: list[ir.Node], known: dict[ir.Value, Tensor], path: Path
) -> dict[ir.Value, Tensor]:
    """What others read of a group's results, computed from known values alone."""
    inside = set(group)
    read = {value: None for node in group for value in node.inputs if value is not None}
    given = [v for v in read if not v.is_initializer() and v.producer() not in inside]
    made = [
        value
        for node in group
        for value in node.outputs
        if value.is_graph_output() or any(user not in inside for user in value.consumers())
    ]
    part = convenience.extract(graph, given, made)
    model = ir.Model(part, ir_version=12)
    ir.save(model, path)
    outputs = run_file(path, {str(value.name): known[value] for value in given}).outputs
    return dict(zip(made, outputs, strict=True))


def _same_as(found: Tensor, seen: Any, exact: Any) -> tuple[Tensor, Tensor]:
    """The fx value that corresponds to a result; of several, the nearest of its shape."""
    if isinstance(seen, Tensor):
        return seen, exact
    fitting = [pair for pair in zip(seen, exact, strict=True) if pair[0].shape == found.shape]
    return min(fitting, key=lambda pair: float((pair[0].double() - found.double()).abs().sum()))
