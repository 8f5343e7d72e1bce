"""Plans leave as annotated ONNX models."""

import inspect
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from precision_compiler.capture import capture_inference
from precision_compiler.compiler import check_forward, rewrite
from precision_compiler.errors import ExportError
from precision_compiler.export.annotations import annotations_of
from precision_compiler.export.onnx_writer import GraphInput, OnnxReport, write_onnx
from precision_compiler.export.operand_rounding import prepare_rounding
from precision_compiler.export.plan_metadata import metadata_of, read_plan
from precision_compiler.joint import JointGraph
from precision_compiler.plan import Plan

__all__ = ["export_onnx", "read_plan"]


def export_onnx(
    model: nn.Module, batch: Any, plan: Plan, path: str | os.PathLike[str]
) -> OnnxReport:
    """Write a model's forward graph with a plan's casts as ONNX (opset 23), checked and run.

    Args:
        model: the module; exported in evaluation mode and left as it was.
        batch: an inference batch (tensor, tuple of arguments or dict of keywords); its shapes
            become the model's.
        plan: made for this model with ``make_plan`` or ``compile``.
        path: the file; written whole or not at all.

    The whole plan stands in the model's metadata, and every node carries its formats and the
    reason. ``read_plan`` gets the plan back.

    Raises:
        CaptureError: the model fails on the batch.
        PlanMismatch: the plan belongs to another model.
        ExportError: an operation has no ONNX form, or the file fails its check.
    """
    joint = capture_inference(model, batch)
    check_forward(plan, joint.sites)
    rewrite(joint, plan, strict=False)
    prepare_rounding(joint.module, joint.inputs)
    inputs, parameters = _inputs(model, batch, joint)
    return write_onnx(
        joint.module,
        parameters=parameters,
        inputs=inputs,
        annotations=annotations_of(joint.module.graph, plan),
        model_metadata=metadata_of(plan),
        path=Path(path),
    )


def _inputs(
    model: nn.Module, batch: Any, joint: JointGraph
) -> tuple[list[GraphInput], dict[str, tuple[str, torch.Tensor]]]:
    """Tell the batch's tensors, which become model inputs, from what the model holds."""
    public = _public_names(model, batch)
    inputs, constants = [], {}
    holders = joint.module.graph.find_nodes(op="placeholder")
    for node, name, value in zip(holders, joint.names, joint.inputs, strict=True):
        if not isinstance(value, torch.Tensor):
            raise ExportError(f"input {name} is {type(value).__name__}, not a tensor: make it one")
        if id(value) in public:
            inputs.append(GraphInput(node.name, public[id(value)], value))
        else:
            constants[node.name] = (name, value.detach())
    return inputs, constants


def _public_names(model: nn.Module, batch: Any) -> dict[int, str]:
    """Name of every tensor of a batch, by the model's own argument names."""
    if isinstance(batch, Mapping):
        named: dict[str, Any] = dict(batch)
    else:
        values = batch if isinstance(batch, Sequence) else (batch,)
        named = dict(inspect.signature(model.forward).bind(*values).arguments)
    names = {}
    for name, value in named.items():
        leaves = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(value)
            if isinstance(leaf, torch.Tensor)
        ]
        for index, leaf in enumerate(leaves):
            names[id(leaf)] = name if len(leaves) == 1 else f"{name}_{index}"
    return names
