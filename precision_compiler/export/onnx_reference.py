"""The specification's own evaluator, for what onnxruntime has no kernels for."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from precision_compiler.errors import ExportError

_ERRORS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)
"""What the evaluator raises; its operations check little."""


def evaluated(model: onnx.ModelProto, feed: Mapping[str, Any]) -> list[Any]:
    """Arrays that the reference evaluator makes of a model.

    Args:
        model: with all of its data inside.
        feed: an array for every input.

    Raises:
        ExportError: it cannot run the model.
    """
    try:
        with np.errstate(all="ignore"):  # infinities come and go as in any other runtime
            evaluator = ReferenceEvaluator(model, new_ops=[GatherElements])
            return list(evaluator.run(None, dict(feed)))
    except _ERRORS as error:
        said = (str(error).splitlines() or [""])[0]
        raise ExportError(f"onnx.reference cannot run the model: {said}") from error


class GatherElements(OpRun):
    """In place of the evaluator's own, which reads one column of indices only (onnx 1.23)."""

    op_domain = ""

    def _run(self, data: Any, indices: Any, axis: int = 0) -> tuple[Any]:
        axis = axis % data.ndim
        sizes = enumerate(indices.shape)
        within = tuple(slice(None if place == axis else size) for place, size in sizes)
        return (np.take_along_axis(data[within], indices, axis),)
