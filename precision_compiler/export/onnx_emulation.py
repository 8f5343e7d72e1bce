"""Runs an ONNX file in onnxruntime's CPU provider, whose kernels for bfloat16 are few.

Each operation is offered to it alone; those it lacks run in float32 between casts, in a copy in
memory. The file itself is never changed. A file with formats that it does not have at all is run
by the specification's reference evaluator, which is slow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime  # type: ignore[import-untyped]
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state  # type: ignore[import-untyped]

from precision_compiler.export.onnx_reference import evaluated

ORT_ERRORS = (
    ort_state.EPFail,
    ort_state.EngineError,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoSuchFile,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
"""What onnxruntime raises when it cannot load or run a model; they share no base class."""

_LOW = frozenset(
    {
        ir.DataType.BFLOAT16,
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.FLOAT8E5M2,
    }
)
_HALVES = frozenset({ir.DataType.BFLOAT16, ir.DataType.FLOAT16})
_UNKNOWN = frozenset({ir.DataType.FLOAT8E8M0, ir.DataType.FLOAT4E2M1})
"""Formats that onnxruntime's CPU provider can neither compute in nor cast to."""
_NUMPY_LACKS = _LOW - {ir.DataType.FLOAT16}


@dataclass(frozen=True)
class Run:
    """What came out of a file.

    Attributes:
        outputs: its results.
        emulated_nodes: nodes that ran in float32 between casts.
        evaluator: "onnxruntime" or "onnx.reference".
    """

    outputs: list[torch.Tensor]
    emulated_nodes: int
    evaluator: str


def run_file(
    path: Path, inputs: Mapping[str, torch.Tensor], *, every_rounding: bool = False
) -> Run:
    """Run a model.

    Args:
        path: the file.
        inputs: a tensor for every input, by name.
        every_rounding: emulate what computes in 16 bits as well. Where onnxruntime's CPU provider
            lacks a float16 kernel it runs neighbouring nodes in float32 without rounding in
            between: closer to the original than the file is elsewhere.
    """
    model = ir.load(path)
    values = [*model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    held = {value.name for value in model.graph.inputs}
    given = {name: x for name, x in inputs.items() if name in held}
    if _UNKNOWN.intersection(value.dtype for value in values):
        return _run_by_reference(model, path.parent, given)

    def lacks(node: ir.Node) -> bool:
        lost = every_rounding and _computes_in_halves(node)
        return lost or not _has_kernel(node, model.opset_imports)

    emulated = _emulate(model, lacks)
    if _widen_boundary(model) or emulated:
        session = _session(ir.to_proto(model).SerializeToString(), path.parent)
    else:
        session = _session(str(path))
    arrays = session.run(None, {name: _numpy_ready(x) for name, x in given.items()})
    return Run([_tensor_of(array) for array in arrays], emulated, "onnxruntime")


def _run_by_reference(model: ir.Model, folder: Path, inputs: Mapping[str, torch.Tensor]) -> Run:
    """Numpy adds up products of halves in halves: they run in float32 as in onnxruntime."""
    emulated = _emulate(model, _computes_in_halves)
    content = ir.to_proto(model)
    onnx.load_external_data_for_model(content, str(folder))
    arrays = evaluated(content, {name: _exact_numpy(x) for name, x in inputs.items()})
    return Run([_tensor_of(array) for array in arrays], emulated, "onnx.reference")


def _computes_in_halves(node: ir.Node) -> bool:
    values = (*node.inputs, *node.outputs)
    return node.op_type != "Cast" and any(v is not None and v.dtype in _HALVES for v in values)


def _exact_numpy(x: torch.Tensor) -> Any:
    return ir.tensor_adapters.TorchTensor(x.detach().cpu()).numpy()


def _tensor_of(array: Any) -> torch.Tensor:
    """A result as a tensor, formats that numpy lacks in float32."""
    known = array if array.dtype.isbuiltin else array.astype(np.float32)
    return torch.from_numpy(np.array(known))


def _numpy_ready(x: torch.Tensor) -> object:
    dtype = ir.tensor_adapters.from_torch_dtype(x.dtype)
    return (x.float() if dtype in _NUMPY_LACKS else x).detach().cpu().numpy()


def _emulate(model: ir.Model, lacks: Callable[[ir.Node], bool]) -> int:
    """Put float32 casts around each node without a kernel; return how many there were."""
    lacking = [node for node in model.graph if lacks(node)]
    for node in lacking:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype in _LOW:
                cast = _cast(value, ir.DataType.FLOAT)
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, cast.outputs[0])
        for value in node.outputs:
            if value.dtype in _LOW:
                _round_after(model.graph, node, value)
    return len(lacking)


def _cast(value: ir.Value, dtype: ir.DataType, output: ir.Value | None = None) -> ir.Node:
    made = output or ir.Value(type=ir.TensorType(dtype), shape=value.shape)
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[made])
    return node


def _round_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``node`` produce float32, and round it to the value its consumers read."""
    low = value.dtype
    assert low is not None
    rounding = _cast(value, low)
    rounded = rounding.outputs[0]
    graph.insert_after(node, rounding)
    uses = [use for use in value.uses() if use.node is not rounding]
    for use in uses:
        use.node.replace_input_with(use.idx, rounded)
    graph.outputs[:] = [rounded if output is value else output for output in graph.outputs]
    value.type = ir.TensorType(ir.DataType.FLOAT)


def _widen_boundary(model: ir.Model) -> bool:
    """Make inputs and outputs of formats that numpy lacks float32; return if there were any."""
    graph, changed = model.graph, False
    for value in graph.inputs:
        if value.dtype in _NUMPY_LACKS:
            low, uses = value.dtype, list(value.uses())
            cast = _cast(value, low)
            value.type, changed = ir.TensorType(ir.DataType.FLOAT), True
            for use in uses:
                use.node.replace_input_with(use.idx, cast.outputs[0])
            graph.insert_before(graph[0], cast)
    for index, value in enumerate(graph.outputs):
        if value.dtype in _NUMPY_LACKS:
            cast = _cast(value, ir.DataType.FLOAT)
            graph.append(cast)
            graph.outputs[index], changed = cast.outputs[0], True
    return changed


def _has_kernel(node: ir.Node, opsets: Mapping[str, int]) -> bool:
    """Whether onnxruntime's CPU provider runs the node in the formats it is given."""
    types = tuple(value.dtype if value is not None else None for value in node.inputs)
    made = tuple(value.dtype for value in node.outputs)
    if not _LOW.intersection((*types, *made)):
        return True
    return _loads(_alone(node, opsets))


def _alone(node: ir.Node, opsets: Mapping[str, int]) -> bytes:
    """A model of one node; the same bytes for all nodes that onnxruntime answers alike for."""
    given = [
        None if value is None else ir.Value(name=f"input_{place}", type=value.type)
        for place, value in enumerate(node.inputs)
    ]
    made = [
        ir.Value(name=f"output_{place}", type=value.type)
        for place, value in enumerate(node.outputs)
    ]
    alone = ir.Node(node.domain, node.op_type, given, node.attributes, outputs=made)
    held = [value for value in given if value is not None]
    versions = {node.domain: opsets[node.domain]}
    graph = ir.Graph(held, made, nodes=[alone], opset_imports=versions, name="probe")
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


@lru_cache(maxsize=1024)
def _loads(model: bytes) -> bool:
    """Ask onnxruntime whether it has the kernels of a model.

    Only "not implemented" counts as an answer: whatever else is wrong with a node on its own
    will show again, and be reported, when the whole model is loaded.
    """
    try:
        _session(model)
    except ort_state.NotImplemented:
        return False
    except ORT_ERRORS:
        return True
    return True


def _session(model: bytes | str, folder: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    if folder is not None:
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(folder)
        )
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
