"""Existing ONNX files get a plan: read, analysed on calibration data, rewritten, checked."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as clean_up
import torch
from google.protobuf.message import DecodeError

from precision_compiler.annotate.batches import Data, batches_of
from precision_compiler.annotate.check import measured_error
from precision_compiler.annotate.decision import captured_batches, decide_file
from precision_compiler.annotate.describe import describer
from precision_compiler.annotate.onnx_file import NARROW
from precision_compiler.annotate.rewrite import rewrite_file
from precision_compiler.budget import Budget
from precision_compiler.compiler import as_target
from precision_compiler.errors import BudgetError, ExportError, OnnxImportError
from precision_compiler.export.onnx_writer import published
from precision_compiler.export.plan_metadata import plan_entries
from precision_compiler.pipeline import Progress, silent
from precision_compiler.plan import Plan
from precision_compiler.target import Target
from precision_compiler.verification import MISS

__all__ = ["AnnotationReport", "annotate_onnx"]

_IR_VERSION = 10  # the first whose nodes have metadata


@dataclass(frozen=True)
class AnnotationReport:
    """What was written, and how it compares with the original file.

    Attributes:
        path: the file.
        plan: what stands in its metadata.
        nodes: nodes of its graph.
        casts: those of them that are a Cast.
        constant_casts: those of these that data do not reach: runtimes compute them once, when
            they load the file.
        original_casts: Casts of the original file.
        predicted_error: predicted relative error of the float outputs, ``||dY|| / ||Y||``.
        measured_error: the same measured in onnxruntime on the calibration data.
        held_out_error: the same on the held-out data; None where there was none.
        emulated_nodes: nodes that ran in float32 between casts when the error was measured, so
            that every rounding of the file took place: onnxruntime's CPU provider has no kernels
            for bf16 and leaves out roundings to fp16.
    """

    path: Path
    plan: Plan
    nodes: int
    casts: int
    constant_casts: int
    original_casts: int
    predicted_error: float
    measured_error: float
    held_out_error: float | None
    emulated_nodes: int


def annotate_onnx(
    path: str | os.PathLike[str],
    calibration: Data,
    output: str | os.PathLike[str],
    *,
    target: str | Target = "auto",
    budget: float | str = "auto",
    held_out: Data | None = None,
    progress: Progress | None = None,
) -> AnnotationReport:
    """Decide the formats of an existing ONNX file and write it with them.

    Weights become narrow initializers, tensors are cast once per format; inputs and outputs keep
    their types. Formats are fp32, bf16 and fp16, as far as the target has them. The plan and the
    formats of every node stand in the metadata; ``read_plan`` gets the plan back.

    Args:
        path: a float32 model for inference, opset 13 to 24.
        calibration: an npz file, arrays by input name, or several of these.
        output: the file to write; whole or not at all.
        target: as for ``make_plan``.
        budget: largest relative error of the float outputs, ``||dY|| / ||Y||``; "autocast": what
            the bf16 policy of torch.autocast would cause on this graph; "auto" is the same.
        held_out: data to verify the plan on, and to measure the file on as well.
        progress: called with a short sentence before each step.

    Raises:
        OnnxImportError: the file cannot be read, holds an operator that is not supported, or does
            not fit the data.
        BudgetError, TargetError: see there.
        ExportError: the result fails its check, or errs by more than was promised.
    """
    say = progress or silent
    wanted, machine = _budget(budget), _narrowed(as_target(target))
    say("Read the model")
    source, destination = Path(path), Path(output)
    model = _read(source)
    original_casts = _casts(model)
    batches = batches_of(calibration, model)
    others = [] if held_out is None else batches_of(held_out, model)
    say("Translate the graph and compare it with onnxruntime")
    file, captured, originals = captured_batches(model, source, (*batches, *others))
    verifying = captured[len(batches)] if others else None
    decision, placement = decide_file(
        file, captured[: len(batches)], machine, wanted, verifying, progress=say
    )
    plan = decision.plan(progress=say)
    say("Rewrite the file")
    rewrite_file(file, placement, describer(file, plan))
    model.metadata_props.update(plan_entries(plan))
    say("Check the file and measure its error")
    with published(model, destination) as draft:
        error, emulated = measured_error(draft, batches, originals[: len(batches)])
        other = None
        if others:
            other, _ = measured_error(draft, others, originals[len(batches) :])
        _require_promised(max(error, other or 0.0), plan)
    return AnnotationReport(
        destination, plan, len(model.graph), _casts(model), _constant_casts(model), original_casts,
        plan.predicted_gradient_error, error, other, emulated,
    )  # fmt: skip


def _budget(asked: float | str) -> Budget:
    if str(asked).startswith("noise"):
        raise BudgetError(
            f"budget {asked} is relative to a gradient's noise, which inference does not have: "
            "give a number, or 'autocast'"
        )
    return Budget.parse("autocast" if asked == "auto" else asked)


def _narrowed(target: Target) -> Target:
    """The target with the formats that a file holds by casts alone."""
    known = {name: row for name, row in target.formats.items() if name in ("fp32", *NARROW)}
    return replace(target, formats=known)


def _read(path: Path) -> ir.Model:
    try:
        model = ir.load(path)
        ir.external_data.load_to_model(model)  # the result may be written to another folder
    except (OSError, DecodeError, ValueError) as error:
        raise OnnxImportError(f"{path} cannot be read as an ONNX model: {error}") from error
    clean_up.InlinePass()(model)
    clean_up.RemoveUnusedNodesPass()(model)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    taken: set[str] = set()
    for index, node in enumerate(model.graph):
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in taken else f"{name}_{index}"
        taken.add(node.name)
    return model


def _casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def _constant_casts(model: ir.Model) -> int:
    reached, count = set(model.graph.inputs), 0
    for node in model.graph:
        if any(value in reached for value in node.inputs):
            reached.update(node.outputs)
        else:
            count += node.op_type == "Cast"
    return count


def _require_promised(error: float, plan: Plan) -> None:
    allowed = MISS * max(plan.budget.limit, float(torch.finfo(torch.float32).eps) * 100)
    if not error <= allowed:
        raise ExportError(
            f"the outputs of the result err by {error:.2g} where {plan.budget.limit:.2g} is "
            f"allowed and {plan.predicted_gradient_error:.2g} was predicted: give more calibration "
            "data, or a smaller budget"
        )
