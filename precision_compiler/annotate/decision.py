"""The formats of an imported file: analysed, solved for and verified as any other graph's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import torch

from precision_compiler.annotate.batches import Batch
from precision_compiler.annotate.check import original_outputs, require_same
from precision_compiler.annotate.onnx_file import NARROW, OnnxFile
from precision_compiler.annotate.placement import Placement, place, realised
from precision_compiler.annotate.schemas import admits
from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, Forward
from precision_compiler.compiler import Decision, decide
from precision_compiler.errors import AnalysisError
from precision_compiler.importing import import_graph, joint_of
from precision_compiler.pipeline import Progress
from precision_compiler.problem import judged
from precision_compiler.target import Target
from precision_compiler.verification import ROUNDS, verify_plan


def captured_batches(
    model: ir.Model, source: Path, batches: Sequence[Batch]
) -> tuple[OnnxFile, list[Captured], list[list[torch.Tensor]]]:
    """The graph on every batch, and what onnxruntime makes of the original there.

    Batches of the same shapes share a graph; the file is that of the first.

    Raises:
        OnnxImportError: it cannot be translated or run, or the two results differ.
    """
    known: dict[tuple[object, ...], OnnxFile] = {}
    captured, originals = [], []
    for batch in batches:
        imported = import_graph(model, batch)
        originals.append(original_outputs(source, batch))
        require_same(imported, originals[-1])
        key = tuple((name, tensor.shape) for name, tensor in sorted(batch.items()))
        if key not in known:
            known[key] = OnnxFile(model, imported, joint_of(imported))
        joint = known[key].joint.with_inputs(imported.arguments)
        captured.append(Captured(joint, _no_loss, "the model's outputs", batch=batch))
    return next(iter(known.values())), captured, originals


def _no_loss(_forward: Forward) -> torch.Tensor:
    raise AnalysisError("a model for inference has no loss")


def decide_file(
    file: OnnxFile,
    captured: Sequence[Captured],
    target: Target,
    budget: Budget,
    held_out: Captured | None,
    *,
    progress: Progress,
) -> tuple[Decision, Placement]:
    """Choose the formats of a file and where they are carried out.

    What the solver has in a narrow format, but the file does not, because its casts would take
    longer or no node makes or reads it so, is not rounded there: the plan says float32, so that
    its error is that of the file.

    Args:
        file: the imported file.
        captured: its graph on every batch of the calibration data.
        target: the machine.
        budget: allowed error of the outputs.
        held_out: a batch to verify on; the first one without it.
        progress: called with a sentence before each step.
    """
    decision = decide(
        captured[0], target, budget, calibration=tuple(captured[1:]), held_out=held_out,
        vetoes=_impossible(file), progress=progress,
    )  # fmt: skip
    unit = decision.unit
    for _ in range(ROUNDS):
        placement = place(file, unit.assignment, unit.problem.prices, target)
        found = realised(file, unit.assignment, placement)
        if found == unit.assignment:
            break
        assert unit.solution is not None
        unit.solution = judged(unit.problem, found, unit.solution.bound)
        unit.assignment = found
        batch = held_out or captured[0]
        verification = verify_plan(unit, batch, held_out is not None, progress)
        decision = replace(decision, verification=verification)
    return decision, place(file, unit.assignment, unit.problem.prices, target)


def _impossible(file: OnnxFile) -> dict[tuple[str, str], str]:
    """Why some sites cannot have some formats in a file."""
    found: dict[tuple[str, str], str] = {}
    for node in file.model.graph:
        extra = any(file.is_float(value) and value.uses() for value in node.outputs[1:])
        for fmt in NARROW:
            reason = f"support: {node.op_type} has no {fmt} in opset {file.opset}"
            if extra:
                reason = "support: further outputs of the node would be rounded along"
            if extra or not admits(node, file.opset, fmt):
                sites = file.products.get(str(node.name), ())
                found |= {(site.name, fmt): reason for site in sites}
    for value in file.model.graph.outputs:
        root = file.root(value)
        maker, kept = root.producer(), file.stores.get(str(root.name))
        if kept is not None and (maker is None or maker.name not in file.products):
            reason = "support: outputs of the model keep their type"
            found |= {(kept.name, fmt): reason for fmt in NARROW}
    return found
