"""Which nodes of a file compute in a narrow format: what the plan allows, where it pays.

The plan rounds as fast kernels want it, which fuse casts; a file executes literally, and each of
its casts is a kernel. A contraction may compute in the format of its site. Any other node may
compute in a format that the plan keeps its result in, where the plan keeps all of its inputs in
that format too: then nothing is rounded that the plan has not accounted for. Of these nodes, those
compute in the format that together save more than the casts to and from their neighbours cost;
the others compute in float32 instead, which only lowers the error. The choice is a minimum cut
between nodes that compute in the format and nodes that do not: no other one takes less time, and
of those that take the same it has the fewest narrow nodes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, prod

import networkx
import onnx_ir as ir

from precision_compiler.annotate.onnx_file import OnnxFile
from precision_compiler.annotate.schemas import admits, tied_inputs
from precision_compiler.problem import Prices
from precision_compiler.target import Target

FP32 = "fp32"
_NARROW, _WIDE = "narrow", "wide"


@dataclass(frozen=True)
class Placement:
    """Formats in a file.

    Attributes:
        compute: format by node, for those that do not compute in float32.
        kept: format that the plan keeps a value in, by value, where it is narrow.
    """

    compute: Mapping[ir.Node, str]
    kept: Mapping[ir.Value, str]


def place(
    file: OnnxFile, assignment: Mapping[str, str], prices: Prices, target: Target
) -> Placement:
    """Decide which nodes compute in which format.

    Args:
        file: the imported file.
        assignment: format by site.
        prices: seconds of every site in every format.
        target: what a cast costs.
    """
    kept = _kept(file, assignment)
    allowed = _products(file, assignment) | _candidates(file, kept)
    compute: dict[ir.Node, str] = {}
    for fmt in dict.fromkeys(allowed.values()):
        savings = {
            node: _saving(file, node, fmt, prices)
            for node, wanted in allowed.items()
            if wanted == fmt
        }
        compute.update(dict.fromkeys(_worthwhile(file, savings, target), fmt))
    return Placement(compute, kept)


def realised(file: OnnxFile, assignment: Mapping[str, str], placement: Placement) -> dict[str, str]:
    """The assignment that a file carries out: float32 for what it does not compute or keep narrow.

    A copy that only contractions read is the rounding of their operands; everything else reads
    the tensor as it was computed.
    """
    found = dict(assignment)
    for node in file.model.graph:
        if node not in placement.compute:
            found |= {site.name: FP32 for site in file.products.get(str(node.name), ())}
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


def _candidates(file: OnnxFile, kept: Mapping[ir.Value, str]) -> dict[ir.Node, str]:
    """Other nodes that the plan keeps in a narrow format with all that they read."""
    found = {}
    for node in file.model.graph:
        fmt = kept.get(node.outputs[0])
        if fmt is None or not file.is_dynamic(node):
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
    file: OnnxFile, savings: Mapping[ir.Node, float], target: Target
) -> Iterator[ir.Node]:
    """Those nodes for which computing in a format costs less than not doing so.

    Of cuts that cost the same, networkx returns the one with the fewest nodes on the side of the
    sink: the least error.
    """
    flow: networkx.DiGraph[object] = networkx.DiGraph()
    flow.add_nodes_from((_WIDE, _NARROW))
    _add(flow, _WIDE, None, inf)  # the outside reads and writes float32
    for node in file.model.graph:
        if node in savings:
            start, end = (node, _NARROW) if savings[node] > 0 else (_WIDE, node)
            _add(flow, start, end, abs(savings[node]))
        elif file.is_dynamic(node):
            _add(flow, _WIDE, node, inf)
    for value in file.imported.dtypes:
        if file.is_float(value) and not file.is_constant(value) and file.root(value) is value:
            _add_value(flow, file, value, _cast_seconds(file, value, target))
    _, (_, chosen) = networkx.minimum_cut(flow, _WIDE, _NARROW)
    yield from (node for node in savings if node in chosen)


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
    """An edge in whole femtoseconds, so that equal costs are found to be equal."""
    # Unbounded edges have no capacity attribute in networkx.
    start, end = ("outside" if one is None else one for one in (start, end))
    if seconds == inf:
        flow.add_edge(start, end)
    else:
        flow.add_edge(start, end, capacity=round(seconds * 1e15))


def _saving(file: OnnxFile, node: ir.Node, fmt: str, prices: Prices) -> float:
    """Seconds that a node saves in a format: its products, and its results in memory."""
    products = [prices.contractions[site.name] for site in file.products.get(str(node.name), ())]
    stores = [file.stores.get(str(value.name)) for value in node.outputs]
    traffic = [prices.stores[site.name] for site in stores if site is not None]
    return sum(one[FP32] - one[fmt] for one in (*products, *traffic))


def _cast_seconds(file: OnnxFile, value: ir.Value, target: Target) -> float:
    size = float(prod(file.imported.sizes[value]))
    return target.launch_seconds + target.read_seconds(4 * size) + target.write_seconds(2 * size)
