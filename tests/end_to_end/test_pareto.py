"""The command `pareto` and what it writes."""

from pathlib import Path

import pytest

import precision_compiler
from precision_compiler import Frontier, PlanError
from precision_compiler.cli import main
from tests.end_to_end.test_cli import WORKLOAD


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pareto")
    (made / "train.py").write_text(WORKLOAD.replace("WIDTH", "64"))
    return made


def arguments(folder: Path) -> list[str]:
    return [
        "pareto", f"{folder}/train.py:workload", "--target", "h100", "--points", "5",
        "-o", f"{folder}/frontier.json", "--plot", f"{folder}/frontier.png",
    ]  # fmt: skip


def test_it_prints_and_writes_the_frontier(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(arguments(folder)) == 0
    text = capsys.readouterr().out
    assert "Fastest plan for each error" in text
    assert all(name in text for name in ("fp32", "autocast", "plan"))
    assert text.rstrip().endswith(f"wrote {folder}/frontier.png")
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")
    written = Frontier.load(folder / "frontier.json")
    assert written.target == "h100"
    assert written.fp32.error == 0.0
    errors = [point.error for point in written.points]
    times = [point.seconds for point in written.points]
    assert errors == sorted(errors)
    assert times == sorted(times, reverse=True)
    assert all(point.bound_seconds <= point.seconds for point in written.points)
    assert times[0] <= written.fp32.seconds
    assert times[-1] <= written.chosen.seconds
    assert sum(written.chosen.contractions.values()) == sum(written.fp32.contractions.values())
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".py") == [
        *(["__pycache__"] if (folder / "__pycache__").is_dir() else []),
        "frontier.json",
        "frontier.png",
    ]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--plot", "{0}/none/f.png"], "create it"),
        (["-o", "{0}/none/f.json"], "create it"),
        (["--budget", "-1"], "budget"),
    ],
)
def test_mistake_is_one_line(
    folder: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [word.format(folder) for word in extra]
    assert main([*arguments(folder), *more]) == 2
    assert message in capsys.readouterr().err


def test_one_point_is_no_frontier(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments(folder), "--points", "1"])
    assert "2 or more" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "{}", '{"schema_version": 1}'])
def test_corrupt_file_is_said_to_be(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(PlanError, match=r"f\.json"):
        precision_compiler.Frontier.load(tmp_path / "f.json")
    with pytest.raises(PlanError, match="cannot read"):
        Frontier.load(tmp_path / "missing.json")
