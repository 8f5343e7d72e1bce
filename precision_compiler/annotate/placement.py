"""Which nodes of a file compute in a narrow format: what the plan rounds anyway, with few casts.

A contraction computes in the format of its site. Any other node may compute in a format that the
plan keeps its result in, where the plan keeps all of its inputs in that format too: then nothing
is rounded that the plan has not accounted for. Where that would save less than the casts to and
from its neighbours cost, it computes in float32 instead, which only lowers the error. The choice
is a minimum cut between nodes that compute in the format and nodes that do not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, prod

import networkx
import onnx_ir as ir

from precision_compiler.annotate.onnx_file import OnnxFile
from precision_compiler.annotate.schemas import admits, tied_inputs
from precision_compiler.target import Target

FP32 = "fp32"


@dataclass(frozen=True)
class Placement:
    """Formats in a file.

    Attributes:
        compute: format by node, for those that do not compute in float32.
        kept: format that the plan keeps a value in, by value, where it is narrow.
    """

    compute: Mapping[ir.Node, str]
    kept: Mapping[ir.Value, str]


def place(file: OnnxFile, assignment: Mapping[str, str], target: Target) -> Placement:
    """Decide which nodes compute in which format.

    Args:
        file: the imported file.
        assignment: format by site.
        target: what casts and memory traffic cost.
    """
    kept = _kept(file, assignment)
    fixed = _products(file, assignment)
    open_nodes = _candidates(file, kept, fixed)
    compute = dict(fixed)
    for fmt in dict.fromkeys(open_nodes.values()):
        nodes = [node for node, wanted in open_nodes.items() if wanted == fmt]
        compute.update(dict.fromkeys(_worthwhile(file, nodes, fmt, compute, target), fmt))
    return Placement(compute, kept)


def realised(file: OnnxFile, assignment: Mapping[str, str], placement: Placement) -> dict[str, str]:
    """The assignment that a file carries out: float32 for tensors that it does not keep narrow.

    A copy that only contractions read is the rounding of their operands; everything else reads
    the tensor as it was computed.
    """
    found = dict(assignment)
    for value, fmt in placement.kept.items():
        readers = (use.node for use in value.uses()) if file.is_constant(value) else None
        touching = [value.producer(), *(readers or file.readers(value))]
        narrow = [node for node in touching if node and placement.compute.get(node) == fmt]
        others = (node for node in narrow if node.name not in file.products)
        if value.producer() not in narrow and not any(others):
            found[file.stores[str(value.name)].name] = FP32
    return found


def _kept(file: OnnxFile, assignment: Mapping[str, str]) -> dict[ir.Value, str]:
    names = {name: assignment[site.name] for name, site in file.stores.items()}
    values = {*file.imported.dtypes, *file.imported.constants}
    return {
        value: names[str(value.name)]
        for value in values
        if names.get(str(value.name), FP32) != FP32
    }


def _products(file: OnnxFile, assignment: Mapping[str, str]) -> dict[ir.Node, str]:
    """Contractions whose sites agree on a narrow format."""
    found = {}
    for node in file.model.graph:
        formats = {assignment[site.name] for site in file.products.get(str(node.name), ())}
        if len(formats) == 1 and FP32 not in formats:
            found[node] = formats.pop()
    return found


def _candidates(
    file: OnnxFile, kept: Mapping[ir.Value, str], fixed: Mapping[ir.Node, str]
) -> dict[ir.Node, str]:
    found = {}
    for node in file.model.graph:
        fmt = kept.get(node.outputs[0])
        if fmt is None or node in fixed or not file.is_dynamic(node):
            continue
        if node.name in file.products or not admits(node, file.opset, fmt) or _is_split(file, node):
            continue
        if file.selects(node) or all(
            _available(file, node.inputs[place], fmt, kept)
            for place in tied_inputs(node, file.opset)
        ):
            found[node] = fmt
    return found


def _is_split(file: OnnxFile, node: ir.Node) -> bool:
    """Whether a node has further float results, whose rounding nobody has accounted for."""
    return any(file.is_float(value) for value in node.outputs[1:])


def _available(
    file: OnnxFile, value: ir.Value | None, fmt: str, kept: Mapping[ir.Value, str]
) -> bool:
    if value is None or not file.is_float(value):
        return True
    if file.is_constant(value):
        return kept.get(value) == fmt or file.on_grid(value, fmt)
    return kept.get(file.root(value)) == fmt


def _worthwhile(
    file: OnnxFile,
    nodes: Iterable[ir.Node],
    fmt: str,
    fixed: Mapping[ir.Node, str],
    target: Target,
) -> list[ir.Node]:
    """Those nodes for which computing in the format costs less than not doing so."""
    flow: networkx.DiGraph[object] = networkx.DiGraph()
    candidates = list(nodes)
    wide, narrow = "wide", "narrow"
    flow.add_nodes_from((wide, narrow))
    _add(flow, wide, None, inf)  # the outside reads and writes float32
    for node in file.model.graph:
        if node in fixed:
            start, end = (node, narrow) if fixed[node] == fmt else (wide, node)
            _add(flow, start, end, inf)
        elif file.is_dynamic(node) and node not in candidates:
            _add(flow, wide, node, inf)
    for node in candidates:
        _add(flow, node, narrow, _saving(file, node, target))
    for value in file.imported.dtypes:
        if file.is_float(value) and not file.is_constant(value) and file.root(value) is value:
            _add_value(flow, file, value, _cast_seconds(file, value, target))
    _, (_, chosen) = networkx.minimum_cut(flow, wide, narrow, capacity="seconds")
    return [node for node in candidates if node in chosen]


def _add_value(
    flow: "networkx.DiGraph[object]", file: OnnxFile, value: ir.Value, seconds: float
) -> None:
    """One cast for all readers that want the format the maker does not give, either way."""
    maker, readers = value.producer(), list(file.readers(value))
    down, up = ("down", value), ("up", value)
    _add(flow, maker, down, seconds)
    _add(flow, up, maker, seconds)
    for reader in readers:
        _add(flow, down, reader, inf)
        _add(flow, reader, up, inf)


def _add(flow: "networkx.DiGraph[object]", start: object, end: object, seconds: float) -> None:
    # Unbounded edges have no capacity attribute in networkx.
    start, end = ("outside" if one is None else one for one in (start, end))
    if seconds == inf:
        flow.add_edge(start, end)
    else:
        flow.add_edge(start, end, seconds=seconds)


def _elements(file: OnnxFile, value: ir.Value) -> int:
    return prod(file.imported.sizes[value])


def _saving(file: OnnxFile, node: ir.Node, target: Target) -> float:
    """Seconds of traffic that a node saves whose result has two bytes an element, not four."""
    size = 2.0 * _elements(file, node.outputs[0])
    reads = len(list(file.readers(node.outputs[0])))
    return target.write_seconds(size) + reads * target.read_seconds(size)


def _cast_seconds(file: OnnxFile, value: ir.Value, target: Target) -> float:
    size = float(_elements(file, value))
    return target.launch_seconds + target.read_seconds(4 * size) + target.write_seconds(2 * size)
