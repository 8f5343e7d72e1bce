"""ONNX operators on integers with a scale."""

from typing import Any

import onnx_ir as ir
import torch

from precision_compiler.importing.operator import Operator, Table, require
from precision_compiler.importing.tensors import torch_dtype


def _spread(scale: torch.Tensor, x: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    """A scale or zero point, shaped to meet the tensor it belongs to."""
    if scale.numel() == 1:
        return scale.reshape(())
    if block:
        return scale.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return scale.reshape([-1 if place == axis % x.dim() else 1 for place in range(x.dim())])


def _quantise(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> torch.Tensor:
    named = torch_dtype(ir.DataType(output_dtype)) if output_dtype else torch.uint8
    wanted = named if zero is None else zero.dtype
    require(not wanted.is_floating_point, "quantisation to floating point is not supported")
    found = torch.round(x / _spread(scale, x, axis, block_size))
    if zero is not None:
        found = found + _spread(zero, x, axis, block_size)
    limits = torch.iinfo(wanted)
    return torch.clamp(found, limits.min, limits.max).to(wanted)


def _dequantise(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> torch.Tensor:
    require(x.is_floating_point() or x.dtype.itemsize < 8, f"{x.dtype} cannot be dequantised")
    found = x.to(scale.dtype)
    if zero is not None and not x.is_floating_point():
        found = found - _spread(zero, x, axis, block_size).to(scale.dtype)
    return found * _spread(scale, x, axis, block_size)


def _dynamic_quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    low, high = torch.clamp(x.amin(), max=0.0), torch.clamp(x.amax(), min=0.0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    found = torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8)
    return found, scale, zero.to(torch.uint8)


def _shifted(x: torch.Tensor, zero: torch.Tensor | None, axis: int) -> torch.Tensor:
    wide = x.to(torch.int32)
    if zero is None:
        return wide
    return wide - (zero if zero.dim() == 0 else zero.unsqueeze(axis)).to(torch.int32)


def _multiply(a: Any, b: Any, a_zero: Any = None, b_zero: Any = None) -> torch.Tensor:
    return torch.matmul(_shifted(a, a_zero, -1), _shifted(b, b_zero, -2))


QUANTISED: Table = {
    "QuantizeLinear": Operator(_quantise),
    "DequantizeLinear": Operator(_dequantise),
    "DynamicQuantizeLinear": Operator(_dynamic_quantise),
    "MatMulInteger": Operator(_multiply),
}
"""How each is computed."""
