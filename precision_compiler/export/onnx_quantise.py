"""The ONNX form of ``precision_compiler::quantise``: QuantizeLinear, DequantizeLinear and scales.

Written by the exporter in place of the operation. Everything is exact: the result is bit for bit
what the operation computes, on every tensor whose blocks are zero or reach the elements' largest
number times 2^-126 (a smaller block may get twice its scale).
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.values import Opset
from torch import fx

from precision_compiler.elements import FORMATS
from precision_compiler.emulation import QUANTISE
from precision_compiler.formats import CHOICES, scale_exponent
from precision_compiler.scaling import SCALED_FORMATS

_ELEMENTS: Mapping[str, ir.DataType] = {
    "e4m3": ir.DataType.FLOAT8E4M3FN,
    "e5m2": ir.DataType.FLOAT8E5M2,
    "e2m1": ir.DataType.FLOAT4E2M1,
}
_FLOAT = ir.DataType.FLOAT
_LARGEST = FORMATS["fp32"].max_finite
_PLAIN, _WITH_FP4, _WITH_E8M0 = (23, 10), (23, 11), (24, 12)

op: Any = Opset("", _PLAIN[0])
op_with_e8m0: Any = Opset("", _WITH_E8M0[0])


def versions_of(graph: fx.Graph) -> tuple[int, int]:
    """The lowest opset and IR version that have the formats of a graph."""
    needed = [_PLAIN]
    for node in graph.find_nodes(op="call_function", target=QUANTISE):
        row = SCALED_FORMATS.get(str(node.args[1]))
        if row is not None and row.element.bits == 4 and row.scaling.scale != "e8m0":
            needed.append(_WITH_FP4)
        elif row is not None and row.scaling.scale == "e8m0":
            needed.append(_WITH_E8M0)
    return max(needed)


def translate_quantise(
    x: Any, name: str, axis: int = -1, amax: float | None = None, content: str = "activation"
) -> Any:
    """The operation on a value of the exporter; arguments as of ``precision_compiler::quantise``.

    A format with one scale per tensor needs ``amax``: its scale is a constant.
    """
    row = SCALED_FORMATS.get(name)
    if row is None:
        assert amax is not None
        return _under_fixed_scale(x, name, amax)
    return _ROUNDINGS[row.scaling.scale](x, name, axis % len(x.shape))


def _float_scales(x: Any, name: str, axis: int) -> Any:
    """Float32 scales of rows and blocks, with the operations of ``scales.py`` in their order."""
    row = SCALED_FORMATS[name]
    size = row.scaling.size or int(x.shape[axis])
    amax, one = _block_amax(x, axis, size), op.Constant(value_float=1.0)
    encode = op.Div(op.Constant(value_float=row.element.max_finite), amax)
    encode = op.Min(encode, op.Constant(value_float=_LARGEST))
    encode = op.Where(op.Equal(amax, op.Constant(value_float=0.0)), one, encode)
    blocks = op.Mul(_in_blocks(x, axis, size), op.Unsqueeze(encode, _integers(axis + 1)))
    codes = op.Cast(op.Reshape(blocks, op.Shape(x)), to=_ELEMENTS[row.element.name], saturate=1)
    return op.DequantizeLinear(codes, op.Div(one, encode), axis=axis, block_size=size)


TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {QUANTISE: translate_quantise}


def _under_fixed_scale(x: Any, name: str, amax: float) -> Any:
    scale = op.Constant(value_float=2.0 ** -scale_exponent(amax, CHOICES[name]))
    codes = op.QuantizeLinear(x, scale, output_dtype=_ELEMENTS[name], saturate=1)
    return op.DequantizeLinear(codes, scale, output_dtype=_FLOAT)


def _powers_of_two(x: Any, name: str, axis: int) -> Any:
    """MX formats: the least power of two that keeps a block in range.

    The division rounds, but never across a power of two, so rounding its result up is exact.
    """
    element, size = SCALED_FORMATS[name].element, CHOICES[name].block
    ratio = op.Div(_block_amax(x, axis, size), op.Constant(value_float=element.max_finite))
    scale = op_with_e8m0.Cast(ratio, to=ir.DataType.FLOAT8E8M0, round_mode="up")
    where = {"axis": axis, "block_size": size}
    codes = op_with_e8m0.QuantizeLinear(
        x, scale, output_dtype=_ELEMENTS[element.name], precision=_FLOAT, saturate=1, **where
    )
    return op_with_e8m0.DequantizeLinear(codes, scale, output_dtype=_FLOAT, **where)


def _two_levels(x: Any, name: str, axis: int) -> Any:
    """NVFP4, with the operations of ``scales.py`` in their order; each rounds to float32.

    Elements are multiplied by a rounded reciprocal, as in kernels. QuantizeLinear would divide,
    which differs in the last bit, so they are cast.
    """
    element, size = SCALED_FORMATS[name].element, CHOICES[name].block
    amax = _block_amax(x, axis, size)
    whole = op.ReduceMax(amax, keepdims=0)
    one, largest = op.Constant(value_float=1.0), op.Constant(value_float=_LARGEST)
    reach = op.Constant(value_float=FORMATS["e4m3"].max_finite * element.max_finite)
    encode = op.Min(op.Div(reach, whole), largest)
    encode = op.Where(op.Equal(whole, op.Constant(value_float=0.0)), one, encode)
    tensor_scale = op.Div(one, encode)
    part = op.Constant(value_float=float(np.float32(1) / np.float32(element.max_finite)))
    block_scale = op.Cast(op.Mul(amax, op.Mul(encode, part)), to=_ELEMENTS["e4m3"], saturate=1)
    decode = op.DequantizeLinear(block_scale, tensor_scale)
    inverse = op.Min(op.Div(one, decode), largest)
    blocks = op.Mul(_in_blocks(x, axis, size), op.Unsqueeze(inverse, _integers(axis + 1)))
    codes = op.Cast(op.Reshape(blocks, op.Shape(x)), to=_ELEMENTS[element.name])
    return op.DequantizeLinear(codes, decode, axis=axis, block_size=size)


_ROUNDINGS: Mapping[str, Callable[[Any, str, int], Any]] = MappingProxyType(
    {"e8m0": _powers_of_two, "e4m3": _two_levels, "fp32": _float_scales}
)
"""By the format of the scales."""


def _block_amax(x: Any, axis: int, size: int) -> Any:
    """Largest magnitude of each block, in the shape of the block scales."""
    blocks = _in_blocks(x, axis, size)
    return op.ReduceMax(op.Abs(blocks), _integers(axis + 1), keepdims=0)


def _in_blocks(x: Any, axis: int, size: int) -> Any:
    """The tensor with ``axis`` cut in two: blocks and their elements."""
    parts = [_integers(-1, size)]
    if axis:
        parts.insert(0, op.Shape(x, start=0, end=axis))
    if axis + 1 < len(x.shape):
        parts.append(op.Shape(x, start=axis + 1))
    return op.Reshape(x, op.Concat(*parts, axis=0))


def _integers(*numbers: int) -> Any:
    return op.Constant(value_ints=list(numbers))
