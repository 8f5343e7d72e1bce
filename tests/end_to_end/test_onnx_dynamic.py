"""Dimensions that stay open in exported files: run at other sizes, or refused by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import precision_compiler
from precision_compiler.capture import capture_inference
from precision_compiler.errors import ExportError
from precision_compiler.export import graph_to_export
from precision_compiler.export.dynamic_sizes import (
    Dynamic,
    named_tensors,
    with_open_sizes,
    with_sizes_read,
)
from precision_compiler.export.onnx_emulation import run_file
from tests.models import MODELS, everywhere, made

BOTH = {0: "batch", 1: "sequence"}
OPEN: Mapping[str, Dynamic] = {
    "mlp": {"x": {0: "batch"}, "y": {0: "batch"}},
    "gpt": {"tokens": BOTH, "labels": BOTH},
    "dropout": {"tokens": BOTH, "labels": BOTH},
    "explicit": {"x": BOTH, "mask": BOTH},
    "llama": {"x": {0: "batch"}},  # its rotation is a table of one length
    "vit": {"pixels": {0: "batch"}, "labels": {0: "batch"}},
    "handwritten": {"x": {0: "batch"}},
}


def resized(inputs: Mapping[str, Tensor], dynamic: Dynamic, sizes: Mapping[str, int]) -> Any:
    """The inputs with their open dimensions cut to other sizes."""
    found = dict(inputs)
    for name, held in dynamic.items():
        for dimension, label in held.items():
            if label in sizes:
                found[name] = found[name].narrow(dimension, 0, sizes[label])
    return {name: value.contiguous() for name, value in found.items()}


def leaves(value: Any) -> list[Tensor]:
    fields = vars(value).values() if hasattr(value, "logits") else value
    found = torch.utils._pytree.tree_leaves(list(fields) if fields is not value else value)
    return [leaf for leaf in found if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", ["gpt", "explicit", "vit", "llama"])
def test_a_float32_file_is_the_model_at_every_size(name: str, tmp_path: Path) -> None:
    case, dynamic = made(name), OPEN[name]
    path = tmp_path / "model.onnx"
    plan = everywhere(name, "fp32")
    precision_compiler.export_onnx(case.model, case.batch, plan, path, dynamic=dynamic)
    given = named_tensors(case.model, case.batch)
    for sizes in ({"batch": 4}, {"batch": 1, "sequence": 5}, {"batch": 3, "sequence": 2}):
        inputs = resized(given, dynamic, sizes)
        with torch.no_grad():
            wanted = leaves(case.model.eval()(**inputs))
        found = run_file(path, inputs).outputs
        assert len(found) == len(wanted)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "fmt"), [("gpt", "e4m3"), ("handwritten", "e5m2"), ("gpt", "mxfp4")]
)
def test_a_narrow_file_is_the_rewritten_graph_at_every_size(
    name: str, fmt: str, tmp_path: Path
) -> None:
    case, dynamic = made(name), OPEN[name]
    path, plan = tmp_path / "model.onnx", everywhere(name, fmt)
    precision_compiler.export_onnx(case.model, case.batch, plan, path, dynamic=dynamic)
    held = with_open_sizes(case.model, case.batch, dynamic)
    joint = graph_to_export(case.model, held, plan)
    given = named_tensors(case.model, held)
    labels = {id(tensor): label for label, tensor in given.items()}
    for sizes in ({"batch": 1, "sequence": 5}, {"batch": 3, "sequence": 2}):
        inputs = resized(given, dynamic, sizes)
        values = [inputs[labels[id(v)]] if id(v) in labels else v for v in joint.inputs]
        with torch.no_grad():
            wanted = leaves(joint.module(*values))
        for mine, theirs in zip(run_file(path, inputs).outputs, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_called_as_with_fixed_sizes(name: str) -> None:
    case = made(name)
    fixed = capture_inference(case.model, case.batch).sites
    held = with_open_sizes(case.model, case.batch, OPEN[name])
    joint = with_sizes_read(capture_inference(case.model, held))
    assert all(isinstance(value, Tensor) for value in joint.inputs)
    assert [(s.name, s.signature, s.shape) for s in joint.sites] == [
        (s.name, s.signature, s.shape) for s in fixed
    ]


def test_open_sizes_have_the_users_names(tmp_path: Path) -> None:
    case, plan = made("handwritten"), everywhere("handwritten", "e4m3")
    path = tmp_path / "model.onnx"
    dynamic = {"x": {0: "rows"}}
    report = precision_compiler.export_onnx(case.model, case.batch, plan, path, dynamic=dynamic)
    graph = onnx.load(path).graph
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {"x": ["rows", 16], "output_0": ["rows", 8]}
    notes = [{e.key: e.value for e in node.metadata_props} for node in graph.node]
    assert len(notes) == report.nodes
    assert all("precision_compiler.compute_format" in entry for entry in notes)
    sites = {entry.get("precision_compiler.site") for entry in notes}
    assert {site for site, choice in plan.sites.items() if choice.role == "fprop"} <= sites


def test_the_batch_is_left_as_it_was(tmp_path: Path) -> None:
    case = made("handwritten")
    before = dict(vars(case.batch[0]))
    with_open_sizes(case.model, case.batch, OPEN["handwritten"])
    assert vars(case.batch[0]) == before


# --- what is refused ----------------------------------------------------------------------------


class Fixed(nn.Module):
    """Works on four rows alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, unread: Tensor) -> Tensor:
        made: Tensor = self.fc(x).reshape(4, 8).sum()
        return made


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ({"x": {0: "rows"}}, r"input x: .* a size of 4 alone in dimension 0 \(rows\)"),
        ({"unread": {0: "rows"}}, "does not read input unread"),
        ({"z": {0: "rows"}}, r"no input 'z' .* \['x', 'unread'\]"),
        ({"x": {2: "rows"}}, r"input x of shape \(4, 8\) has no dimension 2"),
        ({"unread": {1: "one"}}, r"dimension 1 \(one\) is 1 in the batch"),
    ],
)
def test_a_dimension_that_cannot_stay_open_is_refused(
    dynamic: Dynamic, message: str, tmp_path: Path
) -> None:
    batch = (torch.randn(4, 8), torch.randn(4, 1))
    model = Fixed()
    plan = precision_compiler.make_plan(model, batch, target="h100", budget=0)
    with pytest.raises(ExportError, match=message):
        precision_compiler.export_onnx(model, batch, plan, tmp_path / "model.onnx", dynamic=dynamic)
    assert not list(tmp_path.iterdir())


def test_a_sum_over_an_open_dimension_has_no_blocks(tmp_path: Path) -> None:
    case, plan = made("explicit"), everywhere("explicit", "fp32")
    formats = {**plan.assignment, "matmul_1.fprop": "nvfp4"}
    with pytest.raises(ExportError, match=r"^matmul_1\.fprop: a sum over an open dimension"):
        precision_compiler.export_onnx(
            case.model, case.batch, plan.with_formats(formats), tmp_path / "model.onnx",
            dynamic=OPEN["explicit"],
        )  # fmt: skip
