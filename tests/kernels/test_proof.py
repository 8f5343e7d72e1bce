"""Machine code is read rightly, and the proof fails where it must."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from precision_compiler.kernels import KERNELS, block_gemm, cross_entropy, scaled_gemm
from precision_compiler.kernels.language import INSTALLED
from precision_compiler.kernels.machine_code import MachineCode, compile_for, machine_code
from precision_compiler.kernels.pages import roofline_table, support_table, updated
from precision_compiler.kernels.proof import claims, failures, prove
from precision_compiler.kernels.targets import architecture_named

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
GOOD = MachineCode(Counter({"QGMMA.64x128x32.F32.E4M3.E4M3": 4}), 168, 0, 98304, 0, "")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="needs Triton")


def problems(code: MachineCode) -> list[str]:
    hopper = architecture_named("sm_90")
    return list(failures(code, hopper, hopper.matrix["e4m3"], True, "e4m3"))


def test_good_code_has_no_failure() -> None:
    assert problems(GOOD) == []


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (replace(GOOD, instructions=Counter({"FFMA": 9})), "no instruction"),
        (replace(GOOD, instructions=GOOD.instructions + Counter({"HGMMA.64x8x16": 1})), "HGMMA"),
        (replace(GOOD, stack=48), "48 bytes of local memory"),
        (replace(GOOD, spills=2), "2 instructions"),
        (replace(GOOD, registers=256), "256 registers"),
        (replace(GOOD, shared=1 << 20), "bytes of shared memory"),
    ],
)
def test_each_fault_is_named(code: MachineCode, words: str) -> None:
    assert len(found := problems(code)) == 1
    assert words in found[0]


def test_page_has_the_tables_that_need_no_compiler() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for table in (support_table(), roofline_table()):
        assert table in page, "run benchmarks/kernels.py --page docs/kernels.md"
    for kernel, architecture, format in claims():
        assert f"| {kernel.name} | {format} | {architecture.name} |" in page


@needs_triton
def test_emulated_block_scales_do_not_pass_for_native_ones() -> None:
    hopper = architecture_named("sm_90")
    build = block_gemm.KERNEL.builds("mxfp8")[0]
    code = machine_code(compile_for(build, hopper), hopper)
    native = architecture_named("sm_100").matrix["mxfp8"]
    assert any("no instruction" in words for words in failures(code, hopper, native, True, "mxfp8"))
    assert code.found(r"HGMMA.*BF16.*")


@needs_triton
def test_spills_are_seen() -> None:
    ampere = architecture_named("sm_80")
    build = replace(cross_entropy.KERNEL.builds("bf16")[0], warps=4)
    code = machine_code(compile_for(build, ampere), ampere)
    assert code.stack
    assert code.spills


@needs_triton
def test_promotion_adds_in_float32_on_hopper() -> None:
    hopper = architecture_named("sm_90")
    _, promoted = scaled_gemm.KERNEL.builds("e4m3")
    fast = replace(promoted, constants={**promoted.constants, "PROMOTE": None})
    adds = [
        sum(machine_code(compile_for(build, hopper), hopper).found("FADD.*").values())
        for build in (fast, promoted)
    ]
    assert adds[1] - adds[0] >= 64  # one for each of a thread's numbers


@needs_triton
@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_fp8_product_is_as_claimed(name: str) -> None:
    findings = list(prove([scaled_gemm.KERNEL], [architecture_named(name)]))
    assert len(findings) == 4
    assert [finding.failures for finding in findings] == [()] * 4


@needs_triton
@pytest.mark.slow
def test_whole_proof_and_its_page() -> None:
    findings = list(prove())
    assert {finding.kernel for finding in findings} == {kernel.name for kernel in KERNELS}
    assert not [finding for finding in findings if finding.failures]
    page = PAGE.read_text(encoding="utf-8")
    assert page == updated(page, findings), "run benchmarks/kernels.py --page docs/kernels.md"
