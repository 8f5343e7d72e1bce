"""What runs where, and why not where it does not."""

import pytest

from precision_compiler.errors import TargetError
from precision_compiler.kernels import KERNELS, architecture_of, supports
from precision_compiler.kernels.proof import claims, estimates
from precision_compiler.kernels.targets import ARCHITECTURES, architecture_named
from precision_compiler.target import Target


@pytest.mark.parametrize(
    ("architecture", "kernel", "format", "words"),
    [
        ("sm_80", "scaled_gemm", "e4m3", "no 8-bit formats"),
        ("sm_90", "block_gemm", "mxfp8", "in bf16 without a word"),
        ("sm_90", "norm_quantise", "mxfp8", "no product that would take"),
        ("gfx942", "scaled_gemm", "e4m3", "e4m3fnuz"),
        ("gfx950", "scaled_gemm", "e4m3fnuz", "gfx942's own"),
        ("gfx950", "block_gemm", "nvfp4", "powers of two only"),
        ("sm_100", "scaled_gemm", "mxfp8", "not written for"),
        ("sm_75", "scaled_gemm", "e4m3", "not proved for sm_75"),
    ],
)
def test_refusal_has_a_reason(architecture: str, kernel: str, format: str, words: str) -> None:
    support = supports(architecture, kernel, format)
    assert not support
    assert words in support.reason


def test_every_refusal_of_a_known_architecture_has_a_reason_in_words() -> None:
    for row in ARCHITECTURES:
        for kernel in KERNELS:
            for format in kernel.formats:
                support = supports(row.name, kernel.name, format)
                assert bool(support) == (support.reason == "")


def test_what_hardware_has_is_supported() -> None:
    assert supports("sm_89", "scaled_gemm", "e4m3")
    assert supports("sm_100", "block_gemm", "nvfp4")
    assert supports("gfx942", "scaled_gemm", "e5m2fnuz")
    assert supports("sm_80", "linear_cross_entropy", "bf16")


def test_names_are_checked() -> None:
    with pytest.raises(TargetError, match="no kernel 'gem'"):
        supports("sm_90", "gem", "e4m3")
    with pytest.raises(TargetError, match="sm_120"):
        architecture_named("sm_1")
    assert architecture_named("sm_90").machine == "h100"


def test_architecture_is_that_of_its_machine() -> None:
    for row in ARCHITECTURES:
        assert architecture_of(Target.load(row.machine)) is row
    assert architecture_of(Target.load("v100")) is None


def test_every_claim_has_an_estimate_above_a_launch() -> None:
    rows = estimates()
    assert len(rows) == len(claims())
    assert all(row.microseconds > 1 for row in rows)
    by_name = {(row.kernel, row.target, row.format): row for row in rows}
    assert by_name["scaled_gemm", "h100", "e4m3"].bound == "operations"
    assert by_name["norm_quantise", "h100", "e4m3"].bound == "memory"
