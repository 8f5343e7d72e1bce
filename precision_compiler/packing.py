"""Operands of scaled matrix products as GPUs take them: elements and scales, summed axis last.

Plain tensor functions, to be run or traced: rounding and scales are those of ``scaled.py``, so the
numbers are the ones that emulation computes with. Axes that kernels want in whole vectors are
filled up with zeros, which change no sum.
"""

from typing import NamedTuple

import torch

from precision_compiler.elements import FORMATS, Format
from precision_compiler.rounding import round_to
from precision_compiler.scaled import quantised_operand
from precision_compiler.scales import scales_of
from precision_compiler.scaling import SCALED_FORMATS, TENSOR, Content, Scaling

ALIGNMENT = 16
"""The summed axis and the right operand's rows are multiples of it (cuBLAS: 16 bytes)."""
_BLOCK_ALIGNMENT = 32
_SCALE_ROWS, _SCALE_COLUMNS = 128, 4


class TensorScale(NamedTuple):
    """A tensor's scale: what it is multiplied by before rounding, and what undoes it; float32."""

    encode: torch.Tensor
    decode: torch.Tensor


class BlockOperand(NamedTuple):
    """An operand in blocks: elements, their scales, and a scale of the whole tensor.

    Attributes:
        elements: (rows, k) in 8 bits, or (rows, k / 2) of packed pairs, the even element low.
        scales: e8m0 or e4m3 numbers, one per block.
        whole: a single float32 number; 1 but in NVFP4.
    """

    elements: torch.Tensor
    scales: torch.Tensor
    whole: torch.Tensor


def tensor_scale(x: torch.Tensor, name: str) -> TensorScale:
    """The power of two that brings a tensor's largest magnitude just below a format's largest."""
    amax = torch.maximum(x.amax(), -x.amin()).abs()
    scales = scales_of(amax, FORMATS[name], TENSOR)
    return TensorScale(scales.encode, scales.block)


def tensor_operand(x: torch.Tensor, encode: torch.Tensor, name: str, right: bool) -> torch.Tensor:
    """An operand in an 8-bit format under one scale.

    Args:
        x: (M, K), or (K, N) for the right operand; float32.
        encode: the scale to multiply by, a single number.
        name: of the format.
        right: whether it is the right operand.

    Returns:
        (M, K') or (N', K') in the format's dtype, contiguous; K' and N' are multiples of 16.
    """
    fmt = FORMATS[name]
    rows = _with_sum_last(x, ALIGNMENT, right)
    return _in_rows(round_to(rows * encode, fmt, saturate=True).to(_dtype(fmt)))


def scaled_operand(x: torch.Tensor, name: str, right: bool, content: Content) -> BlockOperand:
    """An operand in an 8-bit format with float32 scales of rows or blocks of 128.

    Args:
        x: (M, K), or (K, N) for the right operand; float32.
        name: of a recipe.
        right: whether it is the right operand.
        content: what the operand is.

    Returns:
        Elements (M, K') or (N', K') with K' and N' multiples of 16; scales (M, 1) for rows,
        (M, K / 128) with M contiguous for blocks of one row, and (M / 128, K / 128) in rows that
        start at multiples of four for square ones: the layouts of ``torch._scaled_mm``.
    """
    row = SCALED_FORMATS[name]
    granularity = row.scaling_of(content).granularity
    rows = _for_scaling(_with_sum_last(x, ALIGNMENT, right), row.scaling_of(content))
    made = quantised_operand(rows, row, content)
    scales = made.scales
    if granularity == "block":
        scales = _in_rows(scales.t()).t()
    elif granularity == "block2d":
        filled = torch.nn.functional.pad(scales, (0, -scales.shape[1] % _SCALE_COLUMNS))
        scales = filled.narrow(1, 0, scales.shape[1])
    else:
        scales = _in_rows(scales)
    return BlockOperand(_in_rows(made.elements.to(_dtype(row.element))), scales, no_scale(x))


def block_operand(
    x: torch.Tensor, name: str, right: bool, blocked: bool, content: Content = "activation"
) -> BlockOperand:
    """An operand in a block format.

    Args:
        x: (M, K), or (K, N) for the right operand; float32.
        name: "mxfp8", "mxfp4", "nvfp4" or a recipe for it.
        right: whether it is the right operand.
        blocked: scales in the order that cuBLAS reads them in, see ``in_blocks``; otherwise one
            row of scales per row of elements.
        content: what the operand is, for recipes.
    """
    elements, codes, whole = block_bytes(x, name, right, blocked, content)
    row = SCALED_FORMATS[name]
    if row.element_dtype is None:
        raise TypeError(name)
    return BlockOperand(elements.view(row.element_dtype), codes.view(row.scale_dtype), whole)


def block_bytes(
    x: torch.Tensor, name: str, right: bool, blocked: bool, content: Content = "activation"
) -> BlockOperand:
    """``block_operand`` with elements of 4 bits and scales as bytes (uint8)."""
    row = SCALED_FORMATS[name]
    rows = _for_scaling(_with_sum_last(x, _BLOCK_ALIGNMENT, right), row.scaling_of(content))
    made = quantised_operand(rows, row, content)
    if row.element.bits == 4:
        elements = packed_pairs(made.elements)
    else:
        elements = made.elements.to(_dtype(row.element))
    if row.scaling.scale == "e8m0":
        codes = (made.scales.view(torch.int32) >> 23).to(torch.uint8)
    else:
        scales = made.scales
        if row.scaling_of(content).granularity == "block2d":  # instructions know rows only
            scales = scales.repeat_interleave(row.scaling.size, 0)[: elements.shape[0]]
        codes = scales.to(row.scale_dtype).view(torch.uint8)
    codes = in_blocks(codes) if blocked else codes
    return BlockOperand(_in_rows(elements), _in_rows(codes), made.tensor_scale)


def packed_pairs(elements: torch.Tensor) -> torch.Tensor:
    """E2m1 numbers (rows, k), float32, as (rows, k / 2) bytes of two codes, the even one low.

    A code is the number's place among 0, .5, 1, 1.5, 2, 3, 4, 6, and 8 more with a minus sign.
    """
    size = elements.abs()
    code = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size * 0.5 + 4))
    sign = (elements.view(torch.int32) >> 28) & 8
    nibbles = (code.to(torch.int32) | sign).to(torch.uint8)
    pairs = nibbles.reshape(*nibbles.shape[:-1], -1, 2)
    low, high = pairs.unbind(-1)
    return low | (high << 4)


def in_blocks(scales: torch.Tensor) -> torch.Tensor:
    """Scales (rows, blocks) in the order of cuBLAS's block-scaled products, one dimension.

    Tiles of 128 rows and 4 blocks lie one after another; within a tile, row ``32 i + j`` has its
    four scales at ``16 j + 4 i`` (cuBLAS documentation, "1D Block Scaling Factors Layout"). What
    is missing in the last tiles is zero.
    """
    rows, blocks = scales.shape
    filled = torch.nn.functional.pad(scales, (0, -blocks % _SCALE_COLUMNS, 0, -rows % _SCALE_ROWS))
    tiles = filled.reshape(-1, 4, 32, filled.shape[1] // _SCALE_COLUMNS, _SCALE_COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1)


def blocked_scales(codes: torch.Tensor) -> torch.Tensor:
    """E8m0 codes (rows, blocks), uint8, as scales in cuBLAS's order, see ``in_blocks``."""
    return _in_rows(in_blocks(codes)).view(torch.float8_e8m0fnu)


def row_scales(codes: torch.Tensor) -> torch.Tensor:
    """E8m0 codes (rows, blocks), uint8, as scales in the same order."""
    return codes.view(torch.float8_e8m0fnu)


def no_scale(like: torch.Tensor) -> torch.Tensor:
    """The scale of a whole tensor that has none: 1, a single float32 number."""
    return like.new_ones((), dtype=torch.float32)


def _with_sum_last(x: torch.Tensor, multiple: int, right: bool) -> torch.Tensor:
    rows = x.t() if right else x
    missing = -rows.shape[1] % multiple
    short = -rows.shape[0] % ALIGNMENT if right else 0
    return torch.nn.functional.pad(rows, (0, missing, 0, short)) if missing or short else rows


def _for_scaling(rows: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    """Square blocks are cut from a tensor that lies in rows."""
    return _in_rows(rows) if scaling.granularity == "block2d" else rows


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """The tensor with its last axis contiguous; not ``x.contiguous()``, which wants the device."""
    return x if x.is_contiguous() else x.clone(memory_format=torch.contiguous_format)


def _dtype(fmt: Format) -> torch.dtype:
    if fmt.dtype is None:
        raise TypeError(fmt.name)
    return fmt.dtype
