"""What the kernels share on the device: rounding to narrow formats, their scales, activations.

Numbers are rounded to the grid of the format in float32 before the cast, as ``rounding`` does on
the CPU. The cast that follows is then exact however hardware or compiler carries it out: Triton
goes through float16 with truncation on sm_89, and its interpreter drops carries.
"""

from typing import Any

import torch

from precision_compiler.elements import FORMATS, Format
from precision_compiler.kernels.language import Value, constexpr, jit, tl

FNUZ = {"e4m3": "e4m3fnuz", "e5m2": "e5m2fnuz"}
TRITON_TYPES = {
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
    "e4m3": "fp8e4nv",
    "e5m2": "fp8e5",
    "e4m3fnuz": "fp8e4b8",
    "e5m2fnuz": "fp8e5b16",
}
"""Triton's names of element formats."""


def grid_constants(fmt: Format) -> dict[str, Any]:
    """Compile-time arguments of kernels that round to ``fmt``."""
    return {
        "SHIFT": 1.5 * 2.0 ** (24 - fmt.precision),
        "LEAST": 1.5 * 2.0 ** (fmt.min_exponent + 24 - fmt.precision),
        "LARGEST": fmt.max_finite,
        "LARGEST_BITS": int(torch.tensor(fmt.max_finite).view(torch.int32)),
        "SIGNED_ZERO": fmt.has_negative_zero,
    }


def storage(name: str) -> torch.dtype:
    """The torch dtype of a format's elements."""
    dtype = FORMATS[name].dtype
    if dtype is None:
        raise TypeError(name)
    return dtype


@jit
def magnitude_bits(x: Value) -> Value:
    """The bits of ``|x|``, int32: ordered as the magnitudes are, with NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def round_to_grid(
    x: Value, SHIFT: constexpr, LEAST: constexpr, LARGEST: constexpr, SIGNED_ZERO: constexpr
) -> Value:
    """``rounding.round_in_place`` after saturation: float32 in and out."""
    inside = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    bits = inside.to(tl.int32, bitcast=True)
    binade = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(binade * SHIFT, LEAST)
    rounded = (inside + shift) - shift
    if SIGNED_ZERO:
        sign = bits & -2147483648
        rounded = (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return rounded


@jit
def scale_exponent(amax_bits: Value, LARGEST_BITS: constexpr) -> Value:
    """``scales._biased_exponent`` rounded up: the least power of two at which nothing saturates."""
    exponent = (amax_bits >> 23) - (LARGEST_BITS >> 23) + 127
    return exponent + ((amax_bits & 0x7FFFFF) > (LARGEST_BITS & 0x7FFFFF)).to(tl.int32)


@jit
def power(biased: Value) -> Value:
    """``2.0**(biased - 127)`` as float32 for integers in 0..254."""
    bits = tl.where(biased == 0, 1 << 22, biased << 23)
    return bits.to(tl.float32, bitcast=True)


@jit
def mx_tile(
    y: Value,
    ROWS: constexpr,
    COLUMNS: constexpr,
    SHIFT: constexpr,
    LEAST: constexpr,
    LARGEST: constexpr,
    LARGEST_BITS: constexpr,
    SIGNED_ZERO: constexpr,
) -> Value:
    """A tile in blocks of 32 along its columns: elements (float32, on the grid) and e8m0 codes."""
    blocks = tl.reshape(y, (ROWS, COLUMNS // 32, 32))
    amax = tl.max(magnitude_bits(blocks), axis=2)
    exponent = scale_exponent(amax, LARGEST_BITS)
    exponent = tl.where(amax == 0x7F800000, 254, exponent)
    exponent = tl.minimum(tl.maximum(exponent, 0), 254)
    scaled = blocks * tl.expand_dims(power(254 - exponent), 2)
    elements = round_to_grid(scaled, SHIFT, LEAST, LARGEST, SIGNED_ZERO)
    codes = tl.where(amax > 0x7F800000, 255, exponent).to(tl.uint8)
    return tl.reshape(elements, (ROWS, COLUMNS)), codes


@jit
def gelu(x: Value) -> Value:
    """``x * Phi(x)`` with the error function, as ``torch.nn.functional.gelu`` has it."""
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@jit
def silu(x: Value) -> Value:
    """``x / (1 + exp(-x))``."""
    return x / (1.0 + tl.exp(-x))
