"""Compares an exported ONNX file with the fx graph it comes from, one fx node at a time.

Every group of ONNX nodes that comes from one fx node is cut out, fed what the fx graph computes,
and its result compared with the fx node's: errors cannot add up, and none can hide behind another.

How far the two may be apart, element by element: one ulp of the format of the result, the two
roundings being of numbers that are as good as equal. Float32 sums are not equal: either side adds
n terms in an order of its own, and errs by up to ``n u sum |terms|`` with u = 2^-24, which is many
ulps of a sum whose terms cancel. That much is allowed beside the ulp, from both sides.
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
from precision_compiler.formats import format_of_dtype, ulp
from precision_compiler.graph import ATTENTION, base_name, contraction_rule
from precision_compiler.sites import operand_nodes


@dataclass(frozen=True)
class Compared:
    """One fx node's value by torch and by the file.

    Attributes:
        node: the node.
        wanted: by torch.
        found: by the file.
        exact: by torch in float64, from the same operands.
        arguments: these operands, and a mapping of named ones.
        index: which of several results it is.
        operations: how many ONNX nodes make it.
    """

    node: fx.Node
    wanted: Tensor
    found: Tensor
    exact: Tensor
    arguments: tuple[Any, ...]
    index: int
    operations: int


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what every node computes, and from what."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}
        self.exact: dict[str, Any] = {}
        self.arguments: dict[str, tuple[Any, ...]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        made = super().call_function(target, args, kwargs)
        self.wide = torch.utils._pytree.tree_map(_widened, (args, kwargs))
        self.last = made if target is QUANTISE else super().call_function(target, *self.wide)
        return made

    def run_node(self, n: fx.Node) -> Any:
        self.last, self.wide = None, ((), {})
        self.seen[n.name] = super().run_node(n)
        self.exact[n.name] = self.last
        self.arguments[n.name] = (*self.wide[0], self.wide[1])
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
            known[value], exact, index = _same_as(
                found, recorder.seen[origin], recorder.exact[origin]
            )
            yield Compared(
                nodes[origin], known[value], found, exact, recorder.arguments[origin], index,
                len(group),
            )  # fmt: skip


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


def _same_as(found: Tensor, seen: Any, exact: Any) -> tuple[Tensor, Tensor, int]:
    """The fx value that corresponds to a result; of several, the nearest of its shape."""
    if isinstance(seen, Tensor):
        return seen, exact, 0
    fitting = [(one, exact[at], at) for at, one in enumerate(seen) if one.shape == found.shape]
    return min(fitting, key=lambda known: float((known[0].double() - found.double()).abs().sum()))


# --- how far apart ------------------------------------------------------------------------------

_U: float = 2.0**-24
_FUNCTIONS = {"log": 2}
"""Ulps of functions that torch and onnxruntime compute to less than half of one; others have 1."""


def ulps_apart(item: Compared) -> Tensor:
    """Ulps of its own that every element differs by."""
    fmt = format_of_dtype(item.wanted.dtype)
    assert fmt is not None
    wanted, found = item.wanted.detach().double(), item.found.double()
    apart = torch.where(wanted == found, 0.0, (wanted - found).abs())
    return apart / ulp(torch.maximum(wanted.abs(), found.abs()), fmt)


def allowed_ulps(item: Compared) -> Tensor:
    """Ulps of its own that every element may differ by."""
    fmt = format_of_dtype(item.wanted.dtype)
    assert fmt is not None
    wanted, found = item.wanted.detach().double(), item.found.double()
    own = ulp(torch.maximum(wanted.abs(), found.abs()), fmt)
    return _FUNCTIONS.get(base_name(item.node.target), 1) + _sum_error(item) / own


def _sum_error(item: Compared) -> Tensor:
    """What sums of two orders may differ by: of both sides, from the terms' magnitudes."""
    call: Any = item.node.target
    *given, options = item.arguments
    if call in ATTENTION:
        return _attention_error(item)
    if contraction_rule(item.node) is not None:
        terms = operand_nodes(item.node)[0].meta["val"].shape[-1] + 1  # a bias is one more term
        sizes = torch.utils._pytree.tree_map(_magnitude, given)
        return torch.as_tensor(2 * terms * _U * call(*sizes, **options))
    if torch.Tag.reduction not in getattr(call, "tags", ()) or base_name(call) == "amax":
        return torch.zeros(())
    terms = given[0].numel() // item.wanted.numel()
    magnitudes = call(given[0].abs(), *given[1:], **options)
    if base_name(call) != "var_mean":
        return torch.as_tensor(2 * terms * _U * magnitudes)
    mean: Tensor = 2 * terms * _U * magnitudes[1]
    if item.index == 1:
        return mean
    # The variance around an inexact mean is larger by its error squared.
    around: Tensor = 2 * (terms + 5) * _U * call(*given, **options)[0] + mean**2
    return around


def _magnitude(value: Any) -> Any:
    return value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value


def _attention_error(item: Compared) -> Tensor:
    """Errors of scores, which the exponential makes relative ones, of probabilities and of sums.

    torch rounds probabilities to the format of the values, which the file does not.
    """
    query, key, value, *given, options = item.arguments
    call: Any = item.node.target
    fmt = format_of_dtype(item.wanted.dtype)
    assert fmt is not None
    weighed: Tensor = call(query, key, value.abs(), *given, **options)[0]
    scale = options.get("scale") or query.shape[-1] ** -0.5
    key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)  # heads may share keys
    scores = scale * (query.abs() @ key.abs().mT).amax(-1, keepdim=True)
    sums: Tensor = 2 * (key.shape[-2] + 8) + 4 * (query.shape[-1] + 2) * scores
    rounded: float = 2.0**-fmt.precision
    return (sums * _U + rounded) * weighed
