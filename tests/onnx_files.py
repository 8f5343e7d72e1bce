"""Small ONNX files for tests: one operator at a time, and models that torch exports."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import helper, numpy_helper
from torch import nn

Array = np.ndarray[Any, Any]


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Array],
    outputs: Sequence[str],
    constants: Mapping[str, Array] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model of some nodes; inputs have the shapes of arrays, outputs no declared type."""
    graph = helper.make_graph(
        nodes,
        "test",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape
            )
            for name, array in inputs.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def one_node(
    operator: str,
    inputs: Mapping[str, Array],
    constants: Mapping[str, Array] | None = None,
    opset: int = 18,
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node, its inputs before its constants."""
    names = [*inputs, *(constants or {})]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, names, results, name="the_node", **attributes)
    return model_of([node], inputs, results, constants, opset)


def torch_batch(inputs: Mapping[str, Array]) -> dict[str, torch.Tensor]:
    """Arrays as tensors."""
    return {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}


def loaded(model: onnx.ModelProto) -> ir.Model:
    """The model as onnx_ir has it."""
    return ir.from_proto(model)


class Norm(nn.Module):
    """Root mean square normalisation as most models spell it out: its square leaves fp16."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Block(nn.Module):
    """One layer of a pre-norm decoder without a mask."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.first, self.second, self.heads = Norm(width), Norm(width), heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        y = self.first(x)
        query, key, value = (
            layer(y).view(batch, length, self.heads, -1).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.transpose(-1, -2) / sqrt(width // self.heads)
        mixed = (torch.softmax(scores, -1) @ value).transpose(1, 2).reshape(batch, length, width)
        x = x + self.out(mixed)
        found: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.second(x))))
        return found


class Outliers(nn.Module):
    """Two layers with two channels of a size that trained models have: 2.5e4 and half of it.

    Later norms weigh them little, as trained models do, so that the output depends on the rest.
    """

    def __init__(self, width: int = 64, peak: float = 2.5e4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.norm, self.head = Norm(width), nn.Linear(width, 32, bias=False)
        with torch.no_grad():
            first, second = (block for block in self.blocks if isinstance(block, Block))
            first.down.bias[3], first.down.bias[17] = peak, -peak / 2
            later = [self.norm.weight, second.first.weight, second.second.weight]
            for weight in later:
                weight.mul_(100)
                weight[[3, 17]] = 0.1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        found: torch.Tensor = self.head(self.norm(x))
        return found


def export(
    model: nn.Module,
    arguments: tuple[torch.Tensor, ...],
    names: Sequence[str],
    path: Path,
    opset: int = 18,
    dynamo: bool = True,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> Path:
    """Write a model with one of torch's own exporters."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    options: dict[str, Any] = {"verbose": False, "external_data": False} if dynamo else {}
    if dynamic is not None and dynamo:
        options["dynamic_shapes"] = {
            name: {axis: torch.export.Dim(dim) for axis, dim in axes.items()}
            for name, axes in dynamic.items()
        }
    elif dynamic is not None:
        options["dynamic_axes"] = dynamic
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model.eval(), arguments, str(path), input_names=list(names),
                opset_version=opset, dynamo=dynamo, **options,
            )  # fmt: skip
    finally:
        logging.disable(level)
    return path


def outlier_file(path: Path, opset: int = 18) -> tuple[Path, Array, Array]:
    """The model with outliers, and two batches."""
    torch.manual_seed(0)
    model, first, second = Outliers(), torch.randn(8, 32, 64), torch.randn(8, 32, 64)
    return export(model, (first,), ["x"], path, opset), first.numpy(), second.numpy()


def naive_fp16(path: Path, output: Path) -> Path:
    """The file with everything in fp16 but its inputs and outputs: one rule, no thought."""
    model = ir.load(path)
    half = ir.DataType.FLOAT16
    for value in model.graph.initializers.values():
        held = value.const_value
        if held is not None and held.dtype == ir.DataType.FLOAT:
            value.const_value = ir.tensor(held.numpy().astype(np.float16), name=value.name)
            value.type = ir.TensorType(half)
    for value in model.graph.inputs:
        uses = list(value.uses())
        cast = ir.node("Cast", [value], {"to": half})
        cast.outputs[0].type = ir.TensorType(half)
        model.graph.insert_before(model.graph[0], cast)
        for use in uses:
            use.node.replace_input_with(use.idx, cast.outputs[0])
    for node in model.graph:
        for value in node.outputs:
            if value.dtype == ir.DataType.FLOAT:
                value.type = ir.TensorType(half)
    for index, value in enumerate(list(model.graph.outputs)):
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.append(cast)
        model.graph.outputs[index] = cast.outputs[0]
    ir.save(model, output)
    return output
