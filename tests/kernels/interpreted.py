"""Runs every kernel through Triton's interpreter and prints what differs from its reference.

Started by test_interpreted.py with TRITON_INTERPRET=1. The interpreter of Triton 3.8 converts
floats wrongly (it drops carries and rounds ties away from zero) and computes in bf16 on raw bits,
so its conversion is replaced by that of ml_dtypes, which refuses what is off the grid of 8 bits,
and bf16 operands of products are given in float32. It also takes every block scale for e8m0, so
NVFP4's are decoded for it. What passes proves indices, masks, scales and epilogues, not the
hardware's arithmetic.
"""

import json
import sys
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton.runtime.interpreter as interpreter  # type: ignore[import-not-found, import-untyped, unused-ignore]

from precision_compiler.kernels import KERNELS, block_gemm, cross_entropy, scaled_gemm
from precision_compiler.kernels.compare import mismatches
from precision_compiler.kernels.contract import Kernel

BF16, FP32 = 2.0**-8, 1e-5
"""Largest differences, relative to the largest number, of results in these formats."""
TYPES: dict[str, Any] = {
    "fp8e4nv": ml_dtypes.float8_e4m3fn,
    "fp8e5": ml_dtypes.float8_e5m2,
    "fp8e4b8": ml_dtypes.float8_e4m3fnuz,
    "fp8e5b16": ml_dtypes.float8_e5m2fnuz,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "fp32": np.float32,
    "fp64": np.float64,
}


def convert(x: np.ndarray, source: Any, goal: Any, rounding: Any) -> np.ndarray:
    """Stands in for the interpreter's conversion, to nearest even.

    Kernels round to 8 bits themselves, before they convert: here nothing may be left to round.
    """
    del rounding
    wide = np.frombuffer(x.tobytes(), dtype=TYPES[source.name]).astype(np.float64)
    made: np.ndarray = wide.astype(TYPES[goal.name])
    if goal.primitive_bitwidth == 8:
        np.testing.assert_array_equal(made.astype(np.float64), wide)
    return made.view(f"uint{goal.primitive_bitwidth}").reshape(x.shape)


def decode_e4m3(scale: np.ndarray) -> np.ndarray:
    """Stands in for the interpreter's decoding of block scales in NVFP4."""
    made: np.ndarray = scale.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return made


def arguments(kernel: Kernel, given: tuple[Any, ...]) -> tuple[Any, ...]:
    if not kernel.matrix:
        return given
    return tuple(
        x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x for x in given
    )


def checked(kernel: Kernel, format: str) -> list[str]:
    if format == "nvfp4":
        vars(interpreter)["_e8m0_to_f32"] = decode_e4m3
    found = []
    for case in kernel.cases(format, "cpu"):
        given = arguments(kernel, case)
        made, wanted = kernel.launch(*given), kernel.reference(*given)
        if isinstance(made, torch.Tensor):
            made, wanted = (made,), (wanted,)
        found += mismatches(made, wanted, BF16 if kernel.name == "scaled_gemm" else FP32)
    return found


if __name__ == "__main__":
    vars(interpreter)["_convert_float"] = convert
    for module in (scaled_gemm, block_gemm):  # more than one group of tiles, and several steps
        module.TILE.update(BLOCK_M=16, BLOCK_N=32)
    cross_entropy.CHUNK = 128
    found = {
        f"{kernel.name} {format}": checked(kernel, format)
        for kernel in KERNELS
        for format in kernel.formats
        if kernel.name in sys.argv[1:]
    }
    print(json.dumps(found))
