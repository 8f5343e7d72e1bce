"""The command line: what a newcomer reads, what a session does, what a mistake says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

import precision_compiler
from precision_compiler.cli import main

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "demo", "plan", "pareto", "show", "report", "explain", "diff", "edit", "export", "annotate",
    "targets", "lower", "selftest",
)  # fmt: skip
WORKLOAD = """
import torch
from torch import nn
from precision_compiler import Workload

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 128)
        self.head = nn.Linear(128, 8)

    def forward(self, x):
        return self.head(torch.relu(self.fc(x)))

def workload():
    torch.manual_seed(0)
    batches = [(torch.randn(32, WIDTH),)]
    return Workload(Model(), batches, lambda output, batch: output.square().mean())

def vector_loss():
    return Workload(Model(), [(torch.randn(32, WIDTH),)])

def wrong_shape():
    made = workload()
    return Workload(made.model, [(torch.randn(32, WIDTH + 1),)], made.loss)
"""


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two workloads and the plan of one of them."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "train.py").write_text(WORKLOAD.replace("WIDTH", "64"))
    (folder / "other.py").write_text(WORKLOAD.replace("WIDTH", "96"))
    (folder / "corrupt.json").write_text('{"schema_version": 1, ')
    code = main(
        ["plan", f"{folder}/train.py:workload", "-o", f"{folder}/plan.json", "--target", "h100"]
    )
    assert code == 0
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(model, folder / "plain.onnx")
    (folder / "note.onnx").write_text("not a model")
    return folder


@pytest.fixture(scope="module")
def exported(session: Path) -> Path:
    """The session's model as ONNX."""
    path = session / "model.onnx"
    spec = f"{session}/train.py:workload"
    assert main(["export", spec, f"{session}/plan.json", "-o", str(path)]) == 0
    return path


def test_help_names_every_command_and_a_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"\n    {command} " in text for command in COMMANDS)
    assert "precision-compiler demo --quick" in text
    assert "train.py:workload" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert command in capsys.readouterr().out


def test_package_runs_as_a_module() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "precision_compiler", "--help"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: precision-compiler")


def test_plan_writes_a_plan_that_loads(session: Path) -> None:
    plan = precision_compiler.Plan.load(session / "plan.json")
    assert plan.target == "h100"
    assert {"fc.fprop", "fc.wgrad", "head.fprop", "head.dgrad"} <= set(plan.sites)


def test_plan_prints_the_table_and_where_it_is(
    session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    spec = f"{session}/train.py:workload"
    assert main(["plan", spec, "-o", str(path), "--target", "h100", "--budget", "0.02"]) == 0
    text = capsys.readouterr().out
    assert "0.02 allowed by budget 0.02" in text
    assert "Contractions" in text
    assert text.rstrip().endswith(f"wrote {path}")


def test_show_prints_sites_on_request(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{session}/plan.json"]) == 0
    assert "fprop" in capsys.readouterr().out
    assert main(["show", f"{session}/plan.json", "--sites"]) == 0
    assert "fc.wgrad" in capsys.readouterr().out


@pytest.mark.parametrize(("by", "word"), [("layer", "outside"), ("op", "addmm"), ("role", "dgrad")])
def test_show_by(session: Path, by: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{session}/plan.json", "--by", by]) == 0
    text = capsys.readouterr().out
    assert f"Sites by {by}" in text
    assert word in text


def test_show_json_is_read_by_programs(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", f"{session}/plan.json", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["target"] == "h100"
    assert set(record["by"]) == {"layer", "op", "role"}


def test_report_writes_a_page(
    session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "report.html"
    assert main(["report", f"{session}/plan.json", "-o", str(path)]) == 0
    assert path.read_text("utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out.rstrip().endswith(f"wrote {path}")


def test_diff_of_a_plan_with_itself_is_0(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", f"{session}/plan.json", f"{session}/plan.json"]) == 0
    assert "equal" in capsys.readouterr().out


def test_diff_of_different_plans_is_1(
    session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = precision_compiler.Plan.load(session / "plan.json")
    other = tmp_path / "other.json"
    plan.with_formats({name: "fp32" for name in plan.sites} | {"fc.wgrad": "e5m2"}).save(other)
    assert main(["diff", f"{session}/plan.json", str(other)]) == 1
    assert "-> e5m2" in capsys.readouterr().out
    assert main(["diff", f"{session}/plan.json", str(other), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["same_graph"]
    assert "fc.wgrad" in {change["site"] for change in record["sites"]}


def test_edit_writes_a_plan_and_says_what_changed(
    session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "edited.json"
    given = ["edit", f"{session}/plan.json", "--override", "head.fprop=fp32", "-o", str(written)]
    assert main([*given, "--verify", f"{session}/train.py:workload"]) == 0
    printed = capsys.readouterr().out
    assert "head.fprop" in printed
    assert "measured gradient error" in printed
    assert precision_compiler.Plan.load(written).sites["head.fprop"].format == "fp32"


def test_lower_lists_products_and_writes_the_graph(
    session: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = tmp_path / "graph.txt"
    made = [f"{session}/train.py:workload", f"{session}/plan.json", "-o", str(written)]
    assert main(["lower", *made]) == 0
    printed = capsys.readouterr().out
    plan = precision_compiler.Plan.load(session / "plan.json")
    formats = {choice.format for choice in plan.sites.values() if choice.kind == "contraction"}
    assert all(fmt in printed for fmt in formats)
    assert "tf32_matmul" in printed
    assert "cuda:0" in written.read_text()


def test_export_writes_a_model(
    session: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.onnx"  # the plan may come from a model that has it
    assert main(["export", f"{session}/train.py:workload", str(exported), "-o", str(path)]) == 0
    assert path.stat().st_size > 0
    assert str(path) in capsys.readouterr().out


def test_export_keeps_dimensions_open(session: Path, tmp_path: Path) -> None:
    path = tmp_path / "open.onnx"
    spec, plan = f"{session}/train.py:workload", f"{session}/plan.json"
    assert main(["export", spec, plan, "-o", str(path), "--dynamic", "x:0=rows"]) == 0
    graph = onnx.load(path).graph
    shapes = [value.type.tensor_type.shape.dim for value in (*graph.input, *graph.output)]
    assert [shape[0].dim_param for shape in shapes] == ["rows"] * 2


@pytest.mark.parametrize(
    "arguments",
    ["show {}", "show {} --by op", "show {} --json", "explain {} fc.wgrad"],
)
def test_a_model_is_read_like_its_plan(
    session: Path, exported: Path, arguments: str, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for path in (session / "plan.json", exported):
        assert main(arguments.format(path).split()) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_a_model_has_a_report_and_no_difference_from_its_plan(
    session: Path, exported: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    assert main(["report", str(exported), "-o", str(page)]) == 0
    assert page.read_text("utf-8").startswith("<!doctype html>")
    assert main(["diff", str(exported), f"{session}/plan.json"]) == 0


def test_targets_lists_every_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in precision_compiler.Target.names())
    assert "bf16" in text
    assert "l4?" in text  # a weak row


def test_targets_show_explains_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["targets", "show", "h100"]) == 0
    text = capsys.readouterr().out
    for part in ("80 GB", "3350 GB/s", "132", "cuda 9.0", "tn", "1, 16, 16", "Sources", "float32"):
        assert part in text, part


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan {0}/train.py", "file.py:function"),
        ("plan {0}/train.py:missing", "it has vector_loss, workload, wrong_shape"),
        ("plan {0}/train.py:workload --target h1000", "h1000"),
        ("plan {0}/train.py:workload --budget -1", "budget"),
        ("plan {0}/train.py:workload --budget nan", "budget"),
        ("plan {0}/train.py:workload -o {0}/none/plan.json", "create it"),
        ("plan {0}/train.py:vector_loss", "not a scalar"),
        ("plan {0}/train.py:wrong_shape", "fails on this batch"),
        ("targets show", "name one of cpu, a10"),
        ("targets show h1000", "unknown target 'h1000'"),
        ("show {0}/missing.json", "missing.json"),
        ("show {0}/corrupt.json", "corrupt.json"),
        ("show {0}/missing.onnx", "missing.onnx: No such file"),
        ("show {0}/plain.onnx", "plain.onnx carries no plan"),
        ("explain {0}/note.onnx fc.fprop", "note.onnx is not an ONNX model"),
        ("diff {0}/plan.json {0}/plain.onnx", "plain.onnx carries no plan"),
        ("report {0}/missing.json", "missing.json"),
        ("report {0}/plan.json -o {0}/none/report.html", "create it"),
        ("diff {0}/plan.json {0}/missing.json", "missing.json"),
        ("diff {0}/corrupt.json {0}/plan.json", "corrupt.json"),
        ("export {0}/other.py:workload {0}/plan.json -o {0}/other.onnx", "fc.fprop"),
        ("export {0}/train.py:workload {0}/plan.json --dynamic x", "INPUT:DIMENSION=NAME"),
        ("export {0}/train.py:workload {0}/plan.json --dynamic x:a=b", "INPUT:DIMENSION=NAME"),
        ("export {0}/train.py:workload {0}/plan.json --dynamic y:0=b", "no input 'y'"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(
    session: Path, arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments.format(session).split()) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in captured.err


def test_missing_compiler_is_reported_before_any_work(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "precision_compiler", "demo", "--quick"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("error: torch.compile finds no C++ compiler")
    assert "install" in run.stderr
    assert not list(tmp_path.iterdir())
