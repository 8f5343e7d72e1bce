"""Matrix products in scaled formats as calls to time: random operands, scales of one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from precision_compiler.elements import FORMATS
from precision_compiler.packing import in_blocks
from precision_compiler.scaling import SCALED_FORMATS

SCALED_PRODUCTS = ("e4m3", "e4m3fnuz", "mxfp8", "mxfp4", "nvfp4")
"""Formats that torch multiplies with scales, where the hardware does."""

_MULTIPLE = 32  # of every size, so that each format's rules hold


def scaled_call(m: int, n: int, k: int, name: str, device: str) -> Callable[[], Any]:
    """A product m x k times k x n, sizes rounded up to multiples of 32, bf16 out.

    Args:
        m: rows of the result.
        n: columns of the result.
        k: length of the sum.
        name: one of ``SCALED_PRODUCTS``.
        device: where the operands are made.
    """
    m, n, k = (-(-size // _MULTIPLE) * _MULTIPLE for size in (m, n, k))
    left, right = _elements(m, k, name, device), _elements(n, k, name, device).t()
    scales = _scales(m, k, name, device), _scales(n, k, name, device)
    return partial(torch._scaled_mm, left, right, *scales, out_dtype=torch.bfloat16)


def _elements(rows: int, k: int, name: str, device: str) -> torch.Tensor:
    """Random codes of small numbers: every bit pattern up to 0x37 is one, in all formats.

    Nothing is quantised, which would take many times the operand's memory.
    """
    row = SCALED_FORMATS.get(name)
    dtype = FORMATS[name].dtype if row is None else row.element_dtype
    assert dtype is not None
    per_byte = 2 if row is not None and row.element.bits == 4 else 1
    codes = torch.randint(0x38, (rows, k // per_byte), dtype=torch.uint8, device=device)
    return codes.view(dtype)


def _scales(rows: int, k: int, name: str, device: str) -> torch.Tensor:
    row = SCALED_FORMATS.get(name)
    if row is None:
        return torch.ones((), device=device)
    one = torch.ones((), device=device).to(row.scale_dtype).view(torch.uint8)
    return in_blocks(one.expand(rows, k // row.scaling.size)).view(row.scale_dtype)
