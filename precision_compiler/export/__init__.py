"""Plans leave as annotated ONNX models."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_compiler.capture import capture_inference
from precision_compiler.compiler import rewrite
from precision_compiler.export.annotations import annotations_of
from precision_compiler.export.dynamic_sizes import (
    Dynamic,
    named_tensors,
    refuse_fixed,
    with_open_sizes,
    with_sizes_read,
)
from precision_compiler.export.onnx_writer import GraphInput, OnnxReport, write_onnx
from precision_compiler.export.operand_rounding import prepare_rounding
from precision_compiler.export.plan_metadata import plan_entries, read_plan
from precision_compiler.fitting import check_forward
from precision_compiler.joint import JointGraph
from precision_compiler.plan import Plan

__all__ = ["export_onnx", "graph_to_export", "read_plan"]


def export_onnx(
    model: nn.Module,
    batch: Any,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    dynamic: Dynamic | None = None,
) -> OnnxReport:
    """Write a model's forward graph with a plan's formats as ONNX, checked and run.

    bf16 and fp16 are casts; fp8, MX formats and NVFP4 are pairs of QuantizeLinear and
    DequantizeLinear, with weights stored narrow. The scale of an fp8 operand is fixed, from its
    largest magnitude on ``batch``; scales of blocks are computed in the file. tf32 is written as
    float32.

    Args:
        model: the module; exported in evaluation mode and left as it was.
        batch: an inference batch (tensor, tuple of arguments or dict of keywords), like those
            that the file will see.
        plan: made for this model with ``make_plan`` or ``compile``.
        path: the file; written whole or not at all.
        dynamic: dimensions of inputs that stay open, with names for their sizes, such as
            ``{"input_ids": {0: "batch", 1: "sequence"}}``; all others are the batch's.

    The whole plan stands in the model's metadata, and every node carries its formats and the
    reason. ``read_plan`` gets the plan back.

    Raises:
        CaptureError: the model fails on the batch.
        PlanMismatch: the plan belongs to another model.
        ExportError: an operation or format has no ONNX form, a dimension cannot stay open, or the
            file fails its check.
    """
    held = with_open_sizes(model, batch, dynamic or {})
    joint = graph_to_export(model, held, plan)
    inputs, parameters = _inputs(named_tensors(model, held), joint, dynamic or {})
    return write_onnx(
        joint.module,
        parameters=parameters,
        inputs=inputs,
        annotations=annotations_of(joint.module.graph, plan),
        model_metadata=plan_entries(plan),
        path=Path(path),
    )


def graph_to_export(model: nn.Module, batch: Any, plan: Plan) -> JointGraph:
    """The forward graph as it is exported: what the file computes, operation by operation.

    Args:
        model: the module; captured in evaluation mode and left as it was.
        batch: an inference batch; sizes that it is marked to keep open stay symbolic.
        plan: made for this model.

    Raises:
        CaptureError, PlanMismatch, ExportError: as ``export_onnx``.
    """
    joint = with_sizes_read(capture_inference(model, batch))
    check_forward(plan, joint.sites)
    rewrite(joint, plan, strict=False)
    prepare_rounding(joint.module, joint.inputs)
    return joint


def _inputs(
    public: Mapping[str, torch.Tensor], joint: JointGraph, dynamic: Dynamic
) -> tuple[list[GraphInput], dict[str, tuple[str, torch.Tensor]]]:
    """Tell the batch's tensors, which become model inputs, from what the model holds."""
    names = {id(tensor): name for name, tensor in public.items()}
    inputs, constants = [], {}
    holders = joint.module.graph.find_nodes(op="placeholder")
    for node, held, value in zip(holders, joint.names, joint.inputs, strict=True):
        if id(value) in names:
            name = names[id(value)]
            inputs.append(GraphInput(node.name, name, value, dynamic.get(name, {})))
        else:
            constants[node.name] = (held, value.detach())
    refuse_fixed(joint, {given.placeholder: given.name for given in inputs}, dynamic)
    return inputs, constants
