"""Calibration data: npz files, or arrays by input name, as batches of tensors."""

import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from precision_compiler.errors import OnnxImportError

Batch = Mapping[str, torch.Tensor]
Data = str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]
"""A path of an npz file, arrays by input name, or several of these."""


def batches_of(data: Data, model: ir.Model) -> list[Batch]:
    """All batches in some data.

    Where the model fixes the first size of its inputs and the arrays have a multiple of it, they
    are cut into that many batches.

    Raises:
        OnnxImportError: a file cannot be read, or there is no data.
    """
    if isinstance(data, str | os.PathLike):
        found = list(_cut(_read(data), model))
    elif isinstance(data, Mapping):
        found = list(_cut(data, model))
    else:
        found = [batch for item in data for batch in batches_of(item, model)]
    if not found:
        raise OnnxImportError("there is no calibration data: give at least one batch")
    return found


def _read(path: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    try:
        with np.load(path) as archive:
            if isinstance(archive, np.ndarray):
                raise OnnxImportError(f"{path} holds one array without a name: use numpy.savez")
            return dict(archive)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise OnnxImportError(
            f"cannot read the data {path} ({error}): write it with numpy.savez(path, input=array)"
        ) from error


def _cut(arrays: Mapping[str, Any], model: ir.Model) -> Iterator[Batch]:
    tensors = {name: _tensor(array) for name, array in arrays.items()}
    parts = _parts(tensors, model)
    for index in range(parts):
        yield {name: _part(tensor, index, parts) for name, tensor in tensors.items()}


def _tensor(array: Any) -> torch.Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach().cpu()
    return torch.from_numpy(np.array(array, order="C", copy=True))


def _parts(tensors: Batch, model: ir.Model) -> int:
    """How many batches the arrays hold, by the first sizes that the model fixes."""
    ratios = {1}
    for value in model.graph.inputs:
        given, sizes = tensors.get(str(value.name)), value.shape
        if given is None or sizes is None or not len(sizes) or not given.dim():
            continue
        wanted = sizes[0]
        if isinstance(wanted, int) and wanted and given.shape[0] % wanted == 0:
            ratios.add(given.shape[0] // wanted)
    found = max(ratios)
    even = all(t.dim() and t.shape[0] % found == 0 for t in tensors.values())
    return found if even else 1


def _part(tensor: torch.Tensor, index: int, parts: int) -> torch.Tensor:
    if parts == 1:
        return tensor
    size = tensor.shape[0] // parts
    return tensor[index * size : (index + 1) * size].contiguous()
