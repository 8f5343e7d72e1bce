"""Triton's kernels compute what their references do, as far as the interpreter can tell."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from precision_compiler.kernels import KERNELS
from precision_compiler.kernels.contract import Kernel

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_kernel_agrees_with_its_reference(kernel: Kernel) -> None:
    name, formats = kernel.name, kernel.formats
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.interpreted", name],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {f"{name} {format}": [] for format in formats}
