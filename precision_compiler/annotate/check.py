"""Runs files in onnxruntime: the original against its translation, the result against both."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import torch

from precision_compiler.annotate.batches import Batch
from precision_compiler.errors import ExportError, OnnxImportError
from precision_compiler.export.onnx_check import tolerated_ulps
from precision_compiler.export.onnx_emulation import ORT_ERRORS, run_file
from precision_compiler.importing import Imported
from precision_compiler.replay import relative_error

_EPSILON = float(torch.finfo(torch.float32).eps)


def original_outputs(path: Path, batch: Batch) -> list[torch.Tensor]:
    """What onnxruntime makes of the original file.

    Raises:
        OnnxImportError: it cannot run it.
    """
    try:
        return run_file(path, batch).outputs
    except ORT_ERRORS as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OnnxImportError(f"onnxruntime cannot run {path} on this batch: {first}") from error


def require_same(imported: Imported, outputs: Sequence[torch.Tensor]) -> None:
    """Compare a translation with onnxruntime, as closely as float32 sums in another order allow.

    Raises:
        OnnxImportError: they differ by more.
    """
    ulps, fmt = tolerated_ulps(imported.module.graph)
    relative = max(_EPSILON, 2.0 ** (1 - fmt.precision)) * ulps
    for (name, ours), theirs in zip(imported.outputs.items(), outputs, strict=True):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            raise OnnxImportError(
                f"output {name} is {theirs.dtype} {list(theirs.shape)} in onnxruntime but "
                f"{ours.dtype} {list(ours.shape)} in our translation: please report this file"
            )
        exact = theirs.double()
        differs = (ours.double() - exact).abs().where(ours != theirs, 0.0)
        differs = differs.where(~(ours.isnan() & theirs.isnan()), 0.0)
        largest = float(exact.abs().nan_to_num(0.0, 0.0, 0.0).max()) if exact.numel() else 0.0
        worst = float(differs.nan_to_num(torch.inf).max()) if exact.numel() else 0.0
        allowed = relative * largest if theirs.is_floating_point() else 0.0
        if not worst <= allowed:
            raise OnnxImportError(
                f"output {name} differs by {worst:.2g} between onnxruntime and our translation, "
                f"largest value {largest:.3g}, {allowed:.2g} tolerated: please report this file"
            )


def measured_error(
    path: Path, batches: Sequence[Batch], originals: Sequence[Sequence[torch.Tensor]]
) -> tuple[float, int]:
    """Relative error of a file's float outputs, and nodes that onnxruntime had to emulate.

    Args:
        path: the rewritten file.
        batches: data to run it on.
        originals: outputs of the original file on the same data.

    Raises:
        ExportError: the file violates the specification or does not run.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
        ran = [run_file(path, batch, every_rounding=True) for batch in batches]
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the result: {error}") from error
    except ORT_ERRORS as error:
        raise ExportError(f"onnxruntime cannot run the result: {error}") from error
    ours = [value for run in ran for value in _floats(run.outputs)]
    theirs = [value for outputs in originals for value in _floats(outputs)]
    return relative_error(ours, theirs), max(run.emulated_nodes for run in ran)


def _floats(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [value for value in outputs if value.is_floating_point()]
