"""The bit patterns of formats of up to 16 bits, and the numbers that they stand for."""

from math import frexp

import torch

from precision_compiler.elements import Format
from precision_compiler.errors import FormatError
from precision_compiler.rounding import ulp


def decode(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The numbers of codes in ``0..2^bits - 1`` (integers, any shape), as float32.

    Codes are sign, biased exponent and mantissa from the top bit down; those above the largest
    finite number's are infinity, if the format has one, and NaN. In a format without a negative
    zero its code is the only NaN.

    Raises:
        FormatError: the format has more than 16 bits.
    """
    _check(fmt)
    wide = codes.long()
    if not fmt.signed:
        made = torch.ldexp(torch.ones_like(wide, dtype=torch.float64), wide + fmt.min_exponent)
        return torch.where(made > fmt.max_finite, torch.nan, made).float()
    magnitude = wide & ((1 << (fmt.bits - 1)) - 1)
    per_binade = 1 << (fmt.precision - 1)
    row = torch.clamp(magnitude // per_binade - 1, min=0)  # subnormals lie in the first binade
    units = (magnitude - row * per_binade).double()
    made = torch.ldexp(units, row + fmt.min_exponent - fmt.precision + 1)
    beyond = magnitude - _largest_code(fmt)
    if fmt.has_infinity:
        made = torch.where(beyond == 1, torch.inf, made)
    made = torch.where(beyond > int(fmt.has_infinity), torch.nan, made)
    made = torch.where(wide >> (fmt.bits - 1) == 1, -made, made)
    if not fmt.has_negative_zero:
        made = torch.where(wide == 1 << (fmt.bits - 1), torch.nan, made)
    return made.float()


def encode(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The codes of numbers that lie on a format's grid, as int32.

    Args:
        x: float32 numbers of ``fmt``, as rounding leaves them. NaN gets the lowest quiet NaN's
            code, and zero's in a format that has none: of MX blocks, the scale is NaN as well.
        fmt: a format of up to 16 bits.

    Raises:
        FormatError: the format has more than 16 bits, or a number is not on its grid.
    """
    _check(fmt)
    finite = torch.where(x.isfinite(), x, 1.0 if not fmt.signed else 0.0)
    step = ulp(finite, fmt)
    exponent = torch.frexp(step)[1].long() - 1
    if not fmt.signed:
        made = exponent - fmt.min_exponent
    else:
        row = exponent - (fmt.min_exponent - fmt.precision + 1)
        made = (finite.double().abs() / step).long() + row * (1 << (fmt.precision - 1))
        if fmt.has_infinity:
            made = torch.where(x.isinf(), _largest_code(fmt) + 1, made)
        made = made + (x.signbit().long() << (fmt.bits - 1))
    made = torch.where(x.isnan(), _nan_code(fmt), made)
    known = x.isnan() | (decode(made, fmt) == x)
    if not bool(known.all()):
        raise FormatError(f"{float(x[~known][0]):g} is not a number of {fmt.name}: round it first")
    return made.int()


def _largest_code(fmt: Format) -> int:
    row = frexp(fmt.max_finite)[1] - 1 - fmt.min_exponent
    return round(fmt.max_finite / fmt.smallest_subnormal / 2.0**row) + (row << (fmt.precision - 1))


def _nan_code(fmt: Format) -> int:
    if not fmt.has_nan:
        return 0
    if not fmt.signed:
        return (1 << fmt.bits) - 1
    if not fmt.has_negative_zero:
        return 1 << (fmt.bits - 1)
    if not fmt.has_infinity:
        return _largest_code(fmt) + 1
    return _largest_code(fmt) + 1 + (1 << (fmt.precision - 2))  # the mantissa's top bit is set


def _check(fmt: Format) -> None:
    if fmt.bits > 16:
        raise FormatError(f"codes of {fmt.name} are not made here: it has more than 16 bits")
