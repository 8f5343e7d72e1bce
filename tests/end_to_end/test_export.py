"""Plans leave as ONNX: the planned casts, the whole plan, an entry on every node."""

from pathlib import Path

import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch

import precision_compiler
from precision_compiler.export import read_plan
from precision_compiler.export.plan_metadata import plan_entries
from precision_compiler.plan import Plan
from precision_compiler.target import Target
from tests.made_plans import big_plan
from tests.models import gpt

FP8 = "h100 without launch and memory time"


def fp8_target() -> Target:
    """Small models on it weigh formats as large ones do on the real machine."""
    known = Target.load("h100")
    return Target(
        known.name, known.description, known.device, 100 * known.bandwidth,
        known.bandwidth_fraction, 0.0, known.formats, known.source,
    )  # fmt: skip


def planned(target: str) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...], Plan]:
    torch.manual_seed(0)
    case = gpt()
    chosen = fp8_target() if target == FP8 else target
    plan = precision_compiler.make_plan(case.model, case.batch, target=chosen, budget=0.1)
    return case.model, case.batch, plan


@pytest.mark.parametrize("target", ["a100", FP8])
def test_a_plan_is_exported_whole_and_read_back(target: str, tmp_path: Path) -> None:
    model, inputs, plan = planned(target)
    path = tmp_path / "model.onnx"
    report = precision_compiler.export_onnx(model, inputs, plan, path)
    assert report.casts > 0
    assert read_plan(path) == plan
    nodes = onnx.load(path).graph.node
    assert len(nodes) == report.nodes
    notes = [{entry.key: entry.value for entry in node.metadata_props} for node in nodes]
    assert all("precision_compiler.compute_format" in entry for entry in notes)
    sites = {entry.get("precision_compiler.site") for entry in notes}
    forward = {name for name, choice in plan.sites.items() if choice.role == "fprop"}
    assert forward <= sites


def test_a_plan_of_another_model_is_not_exported(tmp_path: Path) -> None:
    _, inputs, plan = planned("a100")
    other = gpt(width=64)
    with pytest.raises(precision_compiler.PlanMismatch, match="fprop"):
        precision_compiler.export_onnx(other.model, inputs, plan, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_plan_says_so(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "plain.onnx")
    with pytest.raises(precision_compiler.ExportError, match="carries no plan"):
        read_plan(tmp_path / "plain.onnx")


def test_the_plan_survives_onnxruntime(tmp_path: Path) -> None:
    model, inputs, plan = planned("a100")
    fp32 = plan.with_formats(dict.fromkeys(plan.sites, "fp32"))
    precision_compiler.export_onnx(model, inputs, fp32, tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "saved.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    nodes = onnx.load(tmp_path / "saved.onnx").graph.node
    assert not any(node.metadata_props for node in nodes)
    assert read_plan(tmp_path / "saved.onnx") == fp32


def test_metadata_holds_the_plan_of_a_large_model(tmp_path: Path) -> None:
    plan = big_plan(sites=80 * 30, nodes=10_000)
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.helper.set_model_props(model, plan_entries(plan))
    onnx.save(model, tmp_path / "large.onnx")
    assert (tmp_path / "large.onnx").stat().st_size < 0.1 * len(plan.to_json())
    assert read_plan(tmp_path / "large.onnx") == plan
