"""Exact rounding of numbers to a format: to nearest, ties to even, or stochastically."""

import torch

from precision_compiler.elements import Format
from precision_compiler.errors import FormatError

_LARGE = 2.0**64


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """``2.0**exponent`` exactly, as float64, for integers in -1022..1023."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def ulp(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Spacing of ``fmt`` around each element of ``x`` (same shape, float64)."""
    _, exponent = torch.frexp(x.double())  # |x| = m * 2^exponent with m in [1/2, 1)
    normal = torch.clamp(exponent - 1, min=fmt.min_exponent)
    normal = torch.where(x == 0, fmt.min_exponent, normal)  # frexp gives zero the exponent 0
    return power_of_two(normal - fmt.precision + 1)


def round_to(x: torch.Tensor, fmt: Format, *, saturate: bool = False) -> torch.Tensor:
    """Round every element of ``x`` to the nearest number of ``fmt``, ties to even.

    The result has the shape and dtype of ``x`` (float32 or float64) and lies exactly on the
    format's grid. A value that rounds beyond ``max_finite`` becomes infinity, or NaN in a format
    without infinities; with ``saturate``, and in a format that has neither, it becomes the largest
    finite number, infinities included. NaN stays NaN even where the format has none, so that it
    is seen. Zeros keep their sign where the format has two of them.

    In a format without a sign everything but positive numbers becomes NaN, and there is no
    underflow: what is below the smallest number becomes the smallest number.
    """
    if not fmt.signed:
        return _round_to_power(x, fmt, saturate)
    saturate = saturate or not (fmt.has_nan or fmt.has_infinity)
    made = _round_signed(x, fmt, saturate)
    return made if fmt.has_negative_zero else made + 0.0


def _round_signed(x: torch.Tensor, fmt: Format, saturate: bool) -> torch.Tensor:
    if x.dtype != torch.float32:
        return _round_by_spacing(x, fmt, saturate)
    if saturate and fmt.max_finite < _LARGE:  # torch widens 8-bit formats several times slower
        return round_in_place(x.clamp(-fmt.max_finite, fmt.max_finite), fmt, x)
    if fmt.dtype is None or not (saturate or fmt.has_infinity):
        return _round_by_spacing(x, fmt, saturate)  # torch's e4m3 casts differ in what overflows
    within = x.clamp(-fmt.max_finite, fmt.max_finite) if saturate else x
    return within.to(fmt.dtype).to(x.dtype)  # torch's own casts round the same way


def round_in_place(x: torch.Tensor, fmt: Format, sign: torch.Tensor) -> torch.Tensor:
    """``round_to`` for float32 numbers that the range of a format below 2^64 holds.

    To ``x`` is added, and then subtracted, 1.5 times the power of two at which float32 numbers
    are as far apart as the format's are around ``x``: the addition rounds, half to even.

    Args:
        x: the numbers; overwritten and returned.
        fmt: the format; a zero gets a sign if it has one.
        sign: numbers of the same signs as ``x``.
    """
    shift = binade(x).mul_(1.5 * 2.0 ** (24 - fmt.precision))
    shift.clamp_min_(1.5 * 2.0 ** (fmt.min_exponent + 24 - fmt.precision))
    rounded = x.add_(shift).sub_(shift)
    return rounded.copysign_(sign) if fmt.has_negative_zero else rounded


def binade(x: torch.Tensor) -> torch.Tensor:
    """``2**floor(log2|x|)`` of float32 numbers, 0 for zeros and subnormals; a new tensor."""
    return x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)


def _round_by_spacing(x: torch.Tensor, fmt: Format, saturate: bool) -> torch.Tensor:
    """``round_to`` from the definition: the nearest multiple of the format's spacing."""
    wide = x.double()
    step = ulp(torch.where(wide.isfinite(), wide, torch.zeros_like(wide)), fmt)
    rounded = torch.round(wide / step) * step  # torch.round is half to even; the division exact
    rounded = torch.where(wide.isfinite(), rounded, wide)
    over = rounded.abs() > fmt.max_finite
    if saturate:
        rounded = torch.where(over, rounded.sign() * fmt.max_finite, rounded)
    else:
        beyond = torch.inf if fmt.has_infinity else torch.nan
        rounded = torch.where(over, torch.copysign(torch.full_like(wide, beyond), wide), rounded)
    return torch.copysign(rounded, wide).to(x.dtype)


def _round_to_power(x: torch.Tensor, fmt: Format, saturate: bool) -> torch.Tensor:
    """``round_to`` for a format of powers of two: 1.5 times one is a tie and goes up."""
    wide = x.double()
    largest = torch.tensor(fmt.max_finite, dtype=torch.float64)
    mantissa, exponent = torch.frexp(torch.where(wide.isinf(), 2 * largest, wide))
    power = exponent - 1 + (mantissa >= 0.75).int()
    made = power_of_two(power.clamp(fmt.min_exponent, 1023))
    made = torch.where(made > largest, largest if saturate else torch.nan, made)
    return torch.where(wide > 0, made, torch.nan).to(x.dtype)


def round_stochastically(
    x: torch.Tensor, fmt: Format, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Round float32 numbers to one of their two neighbours, at random and without bias.

    ``x`` between neighbours a < b becomes b with probability (x - a) / (b - a), in steps of
    2^-24 (rounded up); a number of the format stays. What is beyond the largest finite number
    saturates; NaN stays NaN. The mean squared error is twice that of rounding to nearest.

    Args:
        x: numbers of any shape, float32.
        fmt: a signed format.
        generator: the source of randomness: one number per element, in the order of ``x``;
            None: torch's own, which ``torch.manual_seed`` seeds.

    Raises:
        FormatError: ``x`` is not float32, or the format has no sign.
    """
    if x.dtype != torch.float32 or not fmt.signed:
        raise FormatError(f"stochastic rounding to {fmt.name} takes float32 and a signed format")
    within = x.clamp(-fmt.max_finite, fmt.max_finite)
    step = binade(within).clamp_min_(2.0**fmt.min_exponent).mul_(2.0 ** (1 - fmt.precision))
    units = within.abs().div_(step)  # exact, as is the fraction below
    low = units.floor()
    chance = torch.rand(x.shape, generator=generator, device=x.device)
    made = low.add_(chance < units.sub_(low)).mul_(step).copysign_(within)
    return made if fmt.has_negative_zero else made + 0.0
