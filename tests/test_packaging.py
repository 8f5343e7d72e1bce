"""What an installation holds is what the checkout holds."""

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def folders_with_code() -> set[str]:
    """Packages by the folders that hold Python files, `passes/` under its import name."""
    found = set()
    for folder, name in (
        (ROOT / "precision_compiler", "precision_compiler"),
        (ROOT / "passes", "precision_compiler.passes"),
    ):
        for path in folder.rglob("*.py"):
            inside = path.parent.relative_to(folder).parts
            if path.parent.is_relative_to(ROOT / "precision_compiler" / "passes"):
                continue  # the link to passes/
            found.add(".".join((name, *inside)))
    return found


def test_packages_list_equals_folders(project: dict[str, Any]) -> None:
    packages = project["tool"]["setuptools"]["packages"]
    assert len(packages) == len(set(packages))
    assert set(packages) == folders_with_code()


def test_every_package_has_an_init() -> None:
    missing = [
        name for name in folders_with_code() if not (folder_of(name) / "__init__.py").is_file()
    ]
    assert not missing


def folder_of(package: str) -> Path:
    relative = package.replace("precision_compiler.passes", "passes").replace(".", "/")
    return ROOT / relative


def test_link_to_passes_is_relative() -> None:
    link = ROOT / "precision_compiler" / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")


@pytest.mark.parametrize("pattern", ["py.typed", "targets/*.toml", "report/templates/*"])
def test_data_files_are_packaged(project: dict[str, Any], pattern: str) -> None:
    assert pattern in project["tool"]["setuptools"]["package-data"]["precision_compiler"]
    assert list((ROOT / "precision_compiler").glob(pattern))


def test_no_other_file_is_left_out(project: dict[str, Any]) -> None:
    patterns = project["tool"]["setuptools"]["package-data"]["precision_compiler"]
    root = ROOT / "precision_compiler"
    packaged = {path for pattern in patterns for path in root.glob(pattern)}
    others = {
        path
        for path in root.rglob("*")
        if path.is_file() and path.suffix not in {".py", ".pyc"} and "passes" not in path.parts
    }
    assert others == packaged


def test_entry_points_exist(project: dict[str, Any]) -> None:
    table = project["project"]
    references = {
        **table["scripts"],
        **table["entry-points"]["torch_dynamo_backends"],
    }
    for name, reference in references.items():
        assert callable(importlib.metadata.EntryPoint(name, reference, "").load())


def test_passes_refuse_another_import_name() -> None:
    code = "import passes"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "ImportError" in run.stderr
    assert "precision_compiler.passes" in run.stderr
