"""The command that checks the kernels on the machine at hand."""

import pytest
import torch

from precision_compiler.cli import main
from precision_compiler.errors import ToolchainError
from precision_compiler.kernels import KERNELS
from precision_compiler.kernels.compare import mismatches
from precision_compiler.kernels.selftest import selftest

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@no_gpu
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cuda"]) == 2
    assert "torch finds no GPU on this machine" in capsys.readouterr().err


@no_gpu
def test_without_a_gpu_the_function_refuses() -> None:
    with pytest.raises(ToolchainError, match="--device cpu"):
        selftest("cuda")


def test_on_the_cpu_every_reference_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(kernel.name in printed for kernel in KERNELS)


def test_differences_are_named() -> None:
    one = torch.tensor([1.0, 2.0])
    narrow = one.to(torch.float8_e4m3fn)
    codes = torch.tensor([1, 2], dtype=torch.uint8)
    assert mismatches([one, narrow, codes], [one, narrow, codes], 0.0) == []
    far = torch.tensor([1.0, 4.0]).to(torch.float8_e4m3fn)
    next_one = torch.tensor([1.0, 2.25]).to(torch.float8_e4m3fn)
    for made, wanted, words in (
        (one, one + 0.5, "differs by 0.5"),
        (narrow, far, "8 numbers apart"),
        (narrow, next_one, "50.00%"),
        (codes, codes + 1, "2 of 2 codes"),
        (one, one.double(), "torch.float32"),
    ):
        assert words in mismatches([made], [wanted], 1e-3)[0]
    assert "1 results instead of 2" in mismatches([one], [one, one], 0.0)[0]
