"""Number formats as data, and one exact rounding function for all of them.

Words: a format keeps ``precision`` significant bits (the hidden one included), its smallest
normal number is ``2**min_exponent`` and below that the spacing stays constant (subnormals).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import frexp, isfinite
from types import MappingProxyType

import numpy as np
import torch

from precision_compiler.errors import FormatError

_SAFE_EXPONENT = 60
_LARGE = 2.0**64

LOG_UNIFORM_SQUARE = 7.0 / 3.0
"""E[x^2] / 4^e for x uniform in the binade [2^e, 2^(e+1))."""


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
        dtype: the torch dtype that stores it, or None where torch has none.
        scaled: whether a tensor needs a scale factor before it fits the format's range.
    """

    name: str
    bits: int
    precision: int
    min_exponent: int
    max_finite: float
    has_infinity: bool
    dtype: torch.dtype | None
    scaled: bool = False

    @property
    def bytes(self) -> float:
        """Bytes of one stored element."""
        return self.bits / 8

    @property
    def smallest_subnormal(self) -> float:
        """Spacing of the numbers below the smallest normal one."""
        return 2.0 ** (self.min_exponent - self.precision + 1)

    def refines(self, other: "Format") -> bool:
        """Whether rounding a value of ``other`` to this format keeps its significant bits."""
        return self.precision >= other.precision


_ROWS = (
    Format("fp32", 32, 24, -126, 3.4028234663852886e38, True, torch.float32),
    Format("tf32", 32, 11, -126, 3.4011621342146535e38, True, None),
    Format("bf16", 16, 8, -126, 3.3895313892515355e38, True, torch.bfloat16),
    Format("fp16", 16, 11, -14, 65504.0, True, torch.float16),
    Format("e4m3", 8, 4, -6, 448.0, False, torch.float8_e4m3fn, scaled=True),
    Format("e5m2", 8, 3, -14, 57344.0, True, torch.float8_e5m2, scaled=True),
)

FORMATS: Mapping[str, Format] = MappingProxyType({row.name: row for row in _ROWS})
"""Every format by name, widest first."""


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
    without infinities; with ``saturate`` it becomes the largest finite number, infinities
    included. NaN stays NaN, zeros keep their sign.
    """
    if x.dtype != torch.float32 or fmt.dtype is None:
        return _round_by_spacing(x, fmt, saturate)
    if fmt.has_infinity and not saturate:  # torch's own casts round the same way
        return x.to(fmt.dtype).to(x.dtype)
    if not saturate:  # torch does not agree with itself on what is beyond the largest e4m3
        return _round_by_spacing(x, fmt, saturate)
    within = x.clamp(-fmt.max_finite, fmt.max_finite)
    if fmt.max_finite < _LARGE:  # torch widens 8-bit formats several times slower
        return _round_by_addition(within, fmt)
    return within.to(fmt.dtype).to(x.dtype)


def _round_by_addition(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """``round_to`` for float32 numbers that the format's range holds and that are below _LARGE.

    To ``x`` is added, and then subtracted, 1.5 times the power of two at which float32 numbers
    are as far apart as the format's are around ``x``: the addition rounds, half to even.
    """
    binade = x.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    shift = binade.mul_(1.5 * 2.0 ** (24 - fmt.precision))
    shift.clamp_min_(1.5 * 2.0 ** (fmt.min_exponent + 24 - fmt.precision))
    return torch.copysign(shift.add(x).sub_(shift), x)


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


def scale_exponent(amax: float, fmt: Format) -> int:
    """Power of two that brings a tensor's largest magnitude just below a scaled format's largest.

    0 for formats without a scale, for zero and for infinite or undefined magnitudes.
    """
    if not fmt.scaled or amax == 0.0 or not isfinite(amax):
        return 0
    return frexp(fmt.max_finite / amax)[1] - 1


def largest_magnitude(x: torch.Tensor) -> float:
    """Largest magnitude of a tensor's elements, 0 for an empty one."""
    if not x.numel():
        return 0.0
    lowest, highest = torch.aminmax(x)
    return float(torch.maximum(-lowest, highest))


def quantised(x: torch.Tensor, fmt: Format, amax: float | None = None) -> torch.Tensor:
    """Round a float32 tensor to a format under the scale that its largest magnitude asks for.

    Args:
        x: the tensor, or a part of it.
        fmt: a scaled format takes ``2**scale_exponent``; both scaling and unscaling are exact.
        amax: largest magnitude of the whole tensor, if ``x`` is a part of it.
    """
    if not fmt.scaled:
        return round_to(x, fmt)
    exponent = scale_exponent(largest_magnitude(x) if amax is None else amax, fmt)
    if abs(exponent) > _SAFE_EXPONENT:  # beyond what float32 can be multiplied by without loss
        scale = 2.0**exponent
        return (round_to(x.double() * scale, fmt, saturate=True) / scale).to(x.dtype)
    return round_to(x * 2.0**exponent, fmt, saturate=True) * 2.0**-exponent


def rounding_variance(exponents: np.ndarray, fmt: Format, scale_exponent: int = 0) -> np.ndarray:
    """Mean squared rounding error of numbers with the given binary exponents.

    Args:
        exponents: ``e`` of binades ``[2^e, 2^(e+1))``, any shape, integers.
        fmt: the format rounded to.
        scale_exponent: numbers are multiplied by ``2**scale_exponent`` before rounding and
            divided again after it.

    Returns:
        ``ulp^2 / 12`` in the binades that the format resolves (uniform error within a spacing;
        Widrow and Kollar, Quantization Noise, ch. 12); where the whole binade rounds to zero,
        the mean square of its numbers.
    """
    shifted = np.asarray(exponents, dtype=np.float64) + scale_exponent
    log_step = np.maximum(shifted, fmt.min_exponent) - fmt.precision + 1
    rounding = np.exp2(2 * log_step) / 12
    flushed = shifted < fmt.min_exponent - fmt.precision
    flush = LOG_UNIFORM_SQUARE * np.exp2(2 * shifted)
    return np.asarray(np.where(flushed, flush, rounding) * np.exp2(-2.0 * scale_exponent))
