"""Store quantised weights as their codes and scales, instead of computing them in the file."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as clean_up
from onnx_ir import convenience

from precision_compiler.export.onnx_reference import evaluated

_KEPT = "DequantizeLinear"


def fold_weights(model: ir.Model) -> None:
    """Compute what DequantizeLinear reads wherever that depends on constants alone.

    The DequantizeLinear itself stays, as the sign that the weight is stored narrow. A constant is
    called like the weight it is made of, with its data type behind. Weights that nothing reads
    any more are removed.
    """
    graph = model.graph
    done: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == _KEPT]:
        read = [value for value in node.inputs if value is not None]
        if not all(leaf.is_initializer() for value in read for leaf in _leaves(value)):
            continue
        new = [value for value in read if _is_computed(value) and value not in done]
        for value, array in _evaluated(model, new).items():
            done[value] = _stored(graph, value, array)
        for index, operand in enumerate(node.inputs):
            if operand in done:
                node.replace_input_with(index, done[operand])
    if done:
        clean_up.RemoveUnusedNodesPass()(model)


def _is_computed(value: ir.Value) -> bool:
    maker = value.producer()
    return maker is not None and maker.op_type != _KEPT


def _leaves(value: ir.Value) -> list[ir.Value]:
    """The initializers and inputs that a value is computed from, the nearest first."""
    found, queue = {value}, [value]
    for item in queue:
        maker = item.producer()
        read = (source for source in maker.inputs if source is not None) if maker else ()
        fresh = [source for source in read if source not in found]
        found.update(fresh)
        queue += fresh
    return [item for item in queue if item.producer() is None]


def _evaluated(model: ir.Model, values: Iterable[ir.Value]) -> Mapping[ir.Value, Any]:
    """Arrays of values that depend on constants alone."""
    wanted = list(values)
    if not wanted:
        return {}
    part = convenience.extract(model.graph, [], wanted)
    content = ir.to_proto(ir.Model(part, ir_version=model.ir_version))
    return dict(zip(wanted, evaluated(content, {}), strict=True))


def _stored(graph: ir.Graph, value: ir.Value, array: Any) -> ir.Value:
    tensor = ir.tensor(array, dtype=ir.DataType.from_numpy(array.dtype))
    weight = max(_leaves(value), key=_size)
    stem = f"{weight.name}.{tensor.dtype.name.lower()}"
    names = itertools.chain([stem], map(f"{stem}_{{}}".format, itertools.count(1)))
    tensor.name = next(name for name in names if name not in graph.initializers)
    made = ir.Value(
        name=tensor.name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.initializers.add(made)
    return made


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else value.const_value.size
