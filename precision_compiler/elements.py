"""Number formats of single numbers, one row of data each.

Words: a format keeps ``precision`` significant bits (the hidden one included), its smallest
normal number is ``2**min_exponent`` and below that the spacing stays constant (subnormals).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from precision_compiler.errors import FormatError


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: the word used in plans and targets.
        bits: storage of one element, in bits (tf32 is stored in 32).
        precision: significant bits, the hidden bit included.
        min_exponent: exponent of the smallest normal number.
        max_finite: largest finite magnitude.
        has_infinity: whether overflow has an infinity to go to (otherwise NaN).
        dtype: the torch dtype that stores one element, or None where torch has none.
        scaled: whether a tensor needs a scale factor before it fits the format's range.
        has_nan: whether there is a NaN; a format with neither saturates whatever is asked for.
        has_negative_zero: whether zero has a sign.
        signed: False for a format of positive numbers alone, which has no zero either.
        block: elements along the summed axis that share a scale, in formats whose blocks have
            one.
        by_axis: whether scales, and so the rounded numbers, depend on the axis that a product
            sums over: those of blocks and rows.
        scale_bits: an element's share of the storage of block scales, in bits.
    """

    name: str
    bits: int
    precision: int
    min_exponent: int
    max_finite: float
    has_infinity: bool
    dtype: torch.dtype | None
    scaled: bool = False
    has_nan: bool = True
    has_negative_zero: bool = True
    signed: bool = True
    block: int = 0
    by_axis: bool = False
    scale_bits: float = 0.0

    @property
    def bytes(self) -> float:
        """Bytes of one stored element, its share of block scales included."""
        return (self.bits + self.scale_bits) / 8

    @property
    def smallest_subnormal(self) -> float:
        """Spacing of the numbers below the smallest normal one."""
        return 2.0 ** (self.min_exponent - self.precision + 1)

    def refines(self, other: "Format") -> bool:
        """Whether rounding a value of ``other`` to this format keeps its significant bits."""
        return self.precision >= other.precision


_FP8 = (
    Format("e4m3", 8, 4, -6, 448.0, False, torch.float8_e4m3fn, scaled=True),
    Format("e5m2", 8, 3, -14, 57344.0, True, torch.float8_e5m2, scaled=True),
)
_FNUZ = tuple(
    Format(*row, scaled=True, has_negative_zero=False)
    for row in (
        ("e4m3fnuz", 8, 4, -7, 240.0, False, torch.float8_e4m3fnuz),
        ("e5m2fnuz", 8, 3, -15, 57344.0, False, torch.float8_e5m2fnuz),
    )
)
_SMALL = tuple(
    Format(*row, False, None, scaled=True, has_nan=False)
    for row in (
        ("e2m3", 6, 4, 0, 7.5),
        ("e3m2", 6, 3, -2, 28.0),
        ("e2m1", 4, 2, 0, 6.0),
    )
)
_ROWS = (
    Format("fp32", 32, 24, -126, 3.4028234663852886e38, True, torch.float32),
    Format("tf32", 32, 11, -126, 3.4011621342146535e38, True, None),
    Format("bf16", 16, 8, -126, 3.3895313892515355e38, True, torch.bfloat16),
    Format("fp16", 16, 11, -14, 65504.0, True, torch.float16),
    *_FP8,
    *_FNUZ,
    *_SMALL,
)

FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
"""Every format that the elements of a tensor can have, by name, widest first.

A format that a target does not list is no candidate on it.
"""

E8M0 = Format(
    "e8m0", 8, 1, -127, 2.0**127, False, torch.float8_e8m0fnu,
    has_negative_zero=False, signed=False,
)  # fmt: skip
"""Powers of two from 2^-127 to 2^127: the format of a scale, never of a tensor's elements."""


def format_named(name: str) -> Format:
    """Return the format called ``name``.

    Raises:
        FormatError: there is no such format; the message lists those there are.
    """
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def format_of_dtype(dtype: torch.dtype) -> Format | None:
    """Return the format a torch dtype stores, or None for dtypes that are not in the table."""
    return next((row for row in _ROWS if row.dtype == dtype), None)
