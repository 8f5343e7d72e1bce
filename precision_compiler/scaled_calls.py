"""Matrix products in scaled formats as calls to time: random operands, scales of one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch


@dataclass(frozen=True)
class _Kind:
    """How ``aten._scaled_mm`` takes a format: dtypes, elements per scale and per byte."""

    elements: torch.dtype
    scales: torch.dtype = torch.float32
    block: int = 0
    packed: int = 1


KINDS: Mapping[str, _Kind] = MappingProxyType(
    {
        "e4m3": _Kind(torch.float8_e4m3fn),
        "e4m3fnuz": _Kind(torch.float8_e4m3fnuz),
        "mxfp8": _Kind(torch.float8_e4m3fn, torch.float8_e8m0fnu, 32),
        "mxfp4": _Kind(torch.float4_e2m1fn_x2, torch.float8_e8m0fnu, 32, 2),
        "nvfp4": _Kind(torch.float4_e2m1fn_x2, torch.float8_e4m3fn, 16, 2),
    }
)
"""Formats that torch multiplies with scales, where the hardware does."""

_MULTIPLE = 32  # of every size, so that each format's rules hold
_SCALE_ROWS, _SCALE_COLUMNS = 128, 4  # of a tile of block scales, cuBLAS's order


def scaled_call(m: int, n: int, k: int, name: str, device: str) -> Callable[[], Any]:
    """A product m x k times k x n, sizes rounded up to multiples of 32, bf16 out.

    Args:
        m: rows of the result.
        n: columns of the result.
        k: length of the sum.
        name: one of ``KINDS``.
        device: where the operands are made.
    """
    kind = KINDS[name]
    m, n, k = (-(-size // _MULTIPLE) * _MULTIPLE for size in (m, n, k))
    left, right = _elements(m, k, kind, device), _elements(n, k, kind, device).t()
    scales = _scales(m, k, kind, device), _scales(n, k, kind, device)
    return partial(torch._scaled_mm, left, right, *scales, out_dtype=torch.bfloat16)


def _elements(rows: int, k: int, kind: _Kind, device: str) -> torch.Tensor:
    """Random codes of small numbers: every bit pattern up to 0x37 is one, in all formats."""
    codes = torch.randint(0x38, (rows, k // kind.packed), dtype=torch.uint8, device=device)
    return codes.view(kind.elements)


def _scales(rows: int, k: int, kind: _Kind, device: str) -> torch.Tensor:
    if not kind.block:
        return torch.ones((), device=device)
    tiles = -(-rows // _SCALE_ROWS) * -(-(k // kind.block) // _SCALE_COLUMNS)
    one = 127 if kind.scales == torch.float8_e8m0fnu else 0x38  # the code of 1
    size = (tiles * _SCALE_ROWS * _SCALE_COLUMNS,)
    return torch.full(size, one, dtype=torch.uint8, device=device).view(kind.scales)
