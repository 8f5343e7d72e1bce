"""Naming a workload on the command line: what is found, and what is said when it is not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from precision_compiler.errors import WorkloadError
from precision_compiler.workload import Workload, load_workload

FILE = """
from precision_compiler import Workload
from torch import nn
import neighbour

NUMBER = 3

def good():
    return Workload(nn.Linear(2, 2), [neighbour.BATCH])

def wrong():
    return NUMBER
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(FILE)
    (tmp_path / "neighbour.py").write_text("BATCH = 'a batch'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_file_is_loaded_with_its_neighbours(folder: Path) -> None:
    workload = load_workload(f"{folder}/train.py:good")
    assert isinstance(workload.model, nn.Linear)
    assert workload.first_batch() == "a batch"


def test_module_is_loaded_from_the_current_folder(folder: Path) -> None:
    (folder / "package").mkdir()
    (folder / "package" / "inner.py").write_text(FILE)
    assert load_workload("package.inner:good").first_batch() == "a batch"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train.py", "write it as file.py:function"),
        (":good", "write it as file.py:function"),
        ("train.py:", "write it as file.py:function"),
        ("missing.py:good", "there is no file missing.py"),
        ("no_such_module:good", "there is no module 'no_such_module'"),
        ("no_such.module:good", "there is no module 'no_such.module'"),
        ("train.py:missing", "has no function 'missing': it has good, wrong"),
        ("train.py:NUMBER", "is of type int: it must be a function"),
        (
            "train.py:wrong",
            "returned an object of type int: let it return precision",
        ),
    ],
)
@pytest.mark.usefixtures("folder")
def test_mistake_is_named_with_its_remedy(spec: str, message: str) -> None:
    with pytest.raises(WorkloadError) as caught:
        load_workload(spec)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_import_inside_a_module_is_not_our_error(folder: Path) -> None:
    (folder / "broken.py").write_text("import does_not_exist")
    with pytest.raises(ModuleNotFoundError, match="does_not_exist"):
        load_workload("broken:good")


def test_first_batch_of_a_generator() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise AssertionError("the second batch was asked for")

    assert Workload(nn.Identity(), batches()).first_batch() == 1


def test_no_batches_is_an_error() -> None:
    with pytest.raises(WorkloadError, match="at least one"):
        Workload(nn.Identity(), []).first_batch()
