"""The inputs of an ONNX graph and a batch that is to be fed to them."""

from collections.abc import Mapping

import onnx_ir as ir
import torch

from precision_compiler.errors import OnnxImportError
from precision_compiler.importing.tensors import torch_dtype


def matched_inputs(
    graph: ir.Graph, batch: Mapping[str, torch.Tensor]
) -> dict[ir.Value, torch.Tensor]:
    """The tensor of every input that is no initializer.

    Raises:
        OnnxImportError: one is missing, unknown, or of another type or shape than the model's.
    """
    wanted = [value for value in graph.inputs if value.name not in graph.initializers]
    names = [str(value.name) for value in wanted]
    unknown = sorted(set(batch) - set(names))
    if unknown:
        raise OnnxImportError(
            f"the batch has {', '.join(unknown)}, which the model lacks: it has {names}"
        )
    for value in wanted:
        if value.name not in batch:
            raise OnnxImportError(
                f"the batch lacks the input {value.name}: give an array for each of {names}"
            )
        _check_input(value, batch[str(value.name)])
    return {value: batch[str(value.name)] for value in wanted}


def _check_input(value: ir.Value, given: torch.Tensor) -> None:
    wanted = None if value.dtype is None else torch_dtype(value.dtype)
    if wanted is not None and given.dtype != wanted:
        raise OnnxImportError(f"input {value.name} is {wanted} in the model, {given.dtype} in data")
    sizes = list(value.shape or given.shape)
    fits = len(sizes) == given.dim() and all(
        not isinstance(size, int) or size == found
        for size, found in zip(sizes, given.shape, strict=False)
    )
    if not fits:
        raise OnnxImportError(
            f"input {value.name} has shape {sizes} in the model, {list(given.shape)} in the data"
        )
