"""ONNX tensors and attributes as torch tensors and Python values."""

from typing import Any

import numpy as np
import onnx_ir as ir
import torch

_BY_BYTES = {1: (np.uint8, torch.uint8), 2: (np.uint16, torch.uint16)}


def torch_tensor(held: ir.TensorProtocol) -> torch.Tensor:
    """A copy of an ONNX tensor; integers of four bits become those of eight."""
    array = held.numpy()
    if held.dtype in (ir.DataType.INT4, ir.DataType.UINT4):
        array = array.astype(np.int8)
    copy = np.array(array, order="C", copy=True).reshape(array.shape)
    if copy.dtype.kind in "biuf":
        return torch.from_numpy(copy)
    bits, raw = _BY_BYTES[copy.dtype.itemsize]  # element types that numpy does not have itself
    return torch.from_numpy(copy.view(bits)).view(raw).view(torch_dtype(held.dtype))


def torch_dtype(dtype: ir.DataType) -> torch.dtype:
    """The torch dtype of an ONNX element type."""
    return ir.tensor_adapters.to_torch_dtype(dtype)


def attribute_value(attribute: ir.Attr) -> Any:
    """An attribute as number, text, list or torch tensor."""
    kind, value = attribute.type, attribute.value
    if kind == ir.AttributeType.TENSOR:
        return torch_tensor(value)
    if kind in (ir.AttributeType.INTS, ir.AttributeType.FLOATS):
        return list(value)
    return value
