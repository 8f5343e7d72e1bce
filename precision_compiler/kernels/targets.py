"""Which architecture has which format, as data: what a kernel must turn into there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from precision_compiler.errors import TargetError


@dataclass(frozen=True)
class Architecture:
    """One family of GPUs that kernels are compiled for.

    Attributes:
        name: "sm_90", "gfx942" and so on.
        backend: Triton's.
        code: Triton's name of the architecture.
        warp: threads of a warp (wavefront).
        machine: a target of ``precision_compiler/targets`` that has it, for rates.
        shared: bytes of shared memory that one program may use.
        registers: per thread.
        matrix: pattern of the matrix instruction by format of the operands.
        convert: pattern of the conversion instruction by format written.
        ptx: words that PTX must have by format, where the mnemonic alone does not tell.
    """

    name: str
    backend: Literal["cuda", "hip"]
    code: int | str
    warp: int
    machine: str
    shared: int
    registers: int
    matrix: Mapping[str, str]
    convert: Mapping[str, str]
    ptx: Mapping[str, str] = field(default_factory=dict)


_TO_FP8 = {
    "e4m3": r"F2FP\.SATFINITE\.E4M3\.F32\.PACK_AB.*",
    "e5m2": r"F2FP\.SATFINITE\.E5M2\.F32\.PACK_AB.*",
}
_VIA_FP16 = {
    "e4m3": r"F2FP\.SATFINITE\.E4M3\.F16\..*",
    "e5m2": r"F2FP\.SATFINITE\.E5M2\.F16\..*",
}
ARCHITECTURES = (
    Architecture(
        "sm_80", "cuda", 80, 32, "a100", 163 << 10, 255,
        {"bf16": r"HMMA\.16816\.F32\.BF16"},
        {},
    ),
    Architecture(
        "sm_89", "cuda", 89, 32, "l40s", 99 << 10, 255,
        {
            "bf16": r"HMMA\.16816\.F32\.BF16",
            "e4m3": r"QMMA\.16832\.F32\.E4M3\.E4M3",
            "e5m2": r"QMMA\.16832\.F32\.E5M2\.E5M2",
        },
        _VIA_FP16,
    ),
    Architecture(
        "sm_90", "cuda", 90, 32, "h100", 227 << 10, 255,
        {
            "bf16": r"HGMMA\.64x\d+x16\.F32\.BF16.*",
            "e4m3": r"QGMMA\.64x\d+x32\.F32\.E4M3\.E4M3.*",
            "e5m2": r"QGMMA\.64x\d+x32\.F32\.E5M2\.E5M2.*",
        },
        _TO_FP8,
    ),
    Architecture(
        "sm_100", "cuda", 100, 32, "b200", 227 << 10, 255,
        {
            "bf16": r"UTCHMMA.*",
            "e4m3": r"UTCQMMA.*",
            "e5m2": r"UTCQMMA.*",
            "mxfp8": r"UTCQMMA.*",
            "mxfp4": r"UTCOMMA.*",
            "nvfp4": r"UTCOMMA\.4X.*",
        },
        _TO_FP8,
        {
            "mxfp8": "kind::mxf8f6f4.block_scale",
            "mxfp4": "kind::mxf4.block_scale",
            "nvfp4": "kind::mxf4nvf4.block_scale",
        },
    ),
    Architecture(
        "sm_120", "cuda", 120, 32, "rtx5090", 99 << 10, 255,
        {
            "bf16": r"HMMA\.16816\.F32\.BF16",
            "e4m3": r"QMMA\.16832\.F32\.E4M3\.E4M3",
            "e5m2": r"QMMA\.16832\.F32\.E5M2\.E5M2",
            "mxfp8": r"QMMA\.SF\..*",
            "mxfp4": r"OMMA\.SF\..*E2M1\.E2M1\.E8",
            "nvfp4": r"OMMA\.SF\..*E2M1\.E2M1\.UE4M3\.4X",
        },
        _TO_FP8,
    ),
    Architecture(
        "gfx942", "hip", "gfx942", 64, "mi300x", 64 << 10, 512,
        {
            "bf16": r"v_mfma_f32_\d+x\d+x\d+_bf16",
            "e4m3fnuz": r"v_mfma_f32_\d+x\d+x\d+_fp8_fp8",
            "e5m2fnuz": r"v_mfma_f32_\d+x\d+x\d+_bf8_bf8",
        },
        {"e4m3fnuz": r"v_cvt_pk_fp8_f32(_e64)?", "e5m2fnuz": r"v_cvt_pk_bf8_f32(_e64)?"},
    ),
    Architecture(
        "gfx950", "hip", "gfx950", 64, "mi355x", 160 << 10, 512,
        {
            "bf16": r"v_mfma_f32_\d+x\d+x\d+_bf16",
            "e4m3": r"v_mfma_f32_\d+x\d+x\d+_(f8f6f4|fp8_fp8)",
            "e5m2": r"v_mfma_f32_\d+x\d+x\d+_(f8f6f4|bf8_bf8)",
            "mxfp8": r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4",
            "mxfp4": r"v_mfma_scale_f32_\d+x\d+x\d+_f8f6f4",
        },
        {
            "e4m3": r"v_cvt_(scalef32_)?pk_fp8_f32(_e64)?",
            "e5m2": r"v_cvt_(scalef32_)?pk_bf8_f32(_e64)?",
        },
    ),
)  # fmt: skip


def architecture_named(name: str) -> Architecture:
    """The architecture called ``name``.

    Raises:
        TargetError: no kernel was ever compiled for it; the message lists those there are.
    """
    found = known_architecture(name)
    if found is None:
        known = ", ".join(row.name for row in ARCHITECTURES)
        raise TargetError(f"kernels are not proved for {name!r}: choose one of {known}")
    return found


def known_architecture(name: str) -> Architecture | None:
    """The architecture called ``name``, or None where no kernel was compiled for it."""
    return next((row for row in ARCHITECTURES if row.name == name), None)


def reason_against(architecture: Architecture, format: str, matrix: bool) -> str:
    """Why an architecture cannot run kernels of a format natively; empty if it can.

    Args:
        architecture: the GPU family.
        format: of the operands, or of what is written.
        matrix: whether matrix instructions are needed, or only conversions.
    """
    if matrix:
        return "" if format in architecture.matrix else _missing(architecture, format)
    element = "e4m3" if format == "mxfp8" else format
    if element not in architecture.convert:
        return _missing(architecture, element)
    if format.startswith("mx") and format not in architecture.matrix:
        return f"{architecture.name} has no product that would take {format}"
    return ""


def _missing(architecture: Architecture, format: str) -> str:
    name = architecture.name
    if format.endswith("fnuz"):
        return f"{name} has OCP's 8-bit formats, and {format} is gfx942's own"
    if format in ("e4m3", "e5m2"):
        other = [key for key in architecture.matrix if key.startswith(format)]
        if other:
            return f"{name} has {other[0]}, and {format} would be widened to fp16"
        return f"{name} has no 8-bit formats"
    if format == "nvfp4" and "mxfp4" in architecture.matrix:
        return f"{name} scales blocks by powers of two only, not by e4m3 numbers"
    if format == "bf16":
        return f"{name} has no products in bf16"
    return f"{name} has no scaled products: Triton would compute {format} in bf16 without a word"
