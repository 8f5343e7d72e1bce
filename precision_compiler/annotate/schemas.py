"""What the ONNX specification says about the element types of a node."""

from collections.abc import Iterable
from functools import lru_cache

import onnx
import onnx_ir as ir

from precision_compiler.formats import CHOICES


@lru_cache(maxsize=512)
def _schema(operator: str, domain: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, opset, domain)
    except onnx.defs.SchemaError:
        return None


def _schema_of(node: ir.Node, opset: int) -> onnx.defs.OpSchema | None:
    return _schema(node.op_type, node.domain, opset)


def _type_of_input(schema: onnx.defs.OpSchema, place: int) -> str:
    """The type parameter of an input; a variadic one stands for all that follow."""
    return str(schema.inputs[min(place, len(schema.inputs) - 1)].type_str)


def tied_inputs(node: ir.Node, opset: int) -> list[int]:
    """Positions of the inputs that share a type with the first input or with an output."""
    schema = _schema_of(node, opset)
    if schema is None or not schema.inputs:
        return []
    kinds = {_type_of_input(schema, 0), *(out.type_str for out in schema.outputs)}
    places = (place for place, value in enumerate(node.inputs) if value is not None)
    return [place for place in places if _type_of_input(schema, place) in kinds]


def tied_outputs(node: ir.Node, opset: int) -> list[int]:
    """Positions of the outputs that share a type with an input."""
    schema = _schema_of(node, opset)
    if schema is None or not schema.inputs:
        return []
    kinds = {_type_of_input(schema, place) for place in range(len(node.inputs))}
    last = len(schema.outputs) - 1
    places = range(len(node.outputs))
    return [place for place in places if schema.outputs[min(place, last)].type_str in kinds]


def admits(node: ir.Node, opset: int, fmt: str) -> bool:
    """Whether the specification lets a node compute in a format and return it."""
    return 0 in tied_outputs(node, opset) and reads(node, opset, (fmt,))


def reads(node: ir.Node, opset: int, formats: Iterable[str]) -> bool:
    """Whether the specification lets a node have its tied inputs in each of some formats."""
    schema = _schema_of(node, opset)
    if schema is None:
        return False
    constraints = {row.type_param_str: row.allowed_type_strs for row in schema.type_constraints}
    kinds = {_type_of_input(schema, place) for place in tied_inputs(node, opset)}
    wanted = [f"tensor({onnx_type(fmt).name.lower()})" for fmt in formats]
    return all(text in constraints.get(kind, (kind,)) for kind in kinds for text in wanted)


def has_attribute(node: ir.Node, opset: int, name: str) -> bool:
    """Whether the specification knows an attribute of a node."""
    schema = _schema_of(node, opset)
    return schema is not None and name in schema.attributes


def onnx_type(fmt: str) -> ir.DataType:
    """The ONNX element type that holds a format."""
    dtype = CHOICES[fmt].dtype
    assert dtype is not None
    return ir.tensor_adapters.from_torch_dtype(dtype)
