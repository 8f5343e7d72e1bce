"""Number formats, rounding to them, and the size of the errors that rounding makes."""

from collections.abc import Mapping
from dataclasses import replace
from math import frexp, isfinite, log, log10
from types import MappingProxyType

import numpy as np
import torch

from precision_compiler.elements import E8M0, FORMATS, Format, format_named, format_of_dtype
from precision_compiler.errors import FormatError
from precision_compiler.rounding import power_of_two, round_stochastically, round_to, ulp
from precision_compiler.scaled import rounded_operand
from precision_compiler.scaling import SCALED_FORMATS, Content

__all__ = [
    "CHOICES",
    "E8M0",
    "FORMATS",
    "LOG_UNIFORM_SQUARE",
    "Format",
    "choice_named",
    "format_named",
    "format_of_dtype",
    "largest_magnitude",
    "power_of_two",
    "predicted_sqnr",
    "quantised",
    "relative_variance",
    "round_stochastically",
    "round_to",
    "rounding_variance",
    "scale_exponent",
    "ulp",
]

CHOICES: Mapping[str, Format] = MappingProxyType(
    dict(FORMATS)
    | {
        name: replace(
            row.element,
            name=name,
            dtype=None,
            scaled=True,
            block=row.scaling.size,
            by_axis=True,
            scale_bits=row.scaling.bits,
        )
        for name, row in SCALED_FORMATS.items()
    }
)
"""Every format that a plan can give a site: those of single elements, and of whole blocks."""

_SAFE_EXPONENT = 60

LOG_UNIFORM_SQUARE = 7.0 / 3.0
"""E[x^2] / 4^e for x uniform in the binade [2^e, 2^(e+1))."""


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


def choice_named(name: str) -> Format:
    """Return the format of ``CHOICES`` called ``name``.

    Raises:
        FormatError: there is no such format; the message lists those there are.
    """
    if name not in CHOICES:
        raise FormatError(f"unknown format {name!r}: choose one of {', '.join(CHOICES)}")
    return CHOICES[name]


def quantised(
    x: torch.Tensor,
    fmt: Format,
    amax: float | None = None,
    axis: int = -1,
    content: Content = "activation",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Round a float32 tensor to a format under the scale that its largest magnitude asks for.

    Args:
        x: the tensor, or a part of it.
        fmt: a scaled format takes ``2**scale_exponent``; both scaling and unscaling are exact.
            In a block format every block has a scale of its own.
        amax: largest magnitude of the whole tensor, if ``x`` is a part of it.
        axis: along which the rows or blocks of a format with such scales lie.
        content: what the tensor is, for recipes.
        generator: of random numbers, where gradients are rounded stochastically; None: torch's.
    """
    if fmt.by_axis:
        return rounded_operand(x, SCALED_FORMATS[fmt.name], axis, content, generator)
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


def relative_variance(fmt: Format) -> float:
    """Mean square rounding error over mean square of numbers in the format's normal range.

    ``0.18 * 4^-p`` for ``p`` significant bits: the mean of ``ulp(x)^2 / (12 x^2)`` over mantissas
    that are uniform in the logarithm is ``(4 / 12) * 3 / (8 ln 2) * 4^-p`` (Widrow and Kollar's
    pseudo quantisation noise has the same 0.180).
    """
    return 4 / 12 * 3 / (8 * log(2)) * 4.0**-fmt.precision


def predicted_sqnr(fmt: Format) -> float:
    """Signal to rounding noise, in dB, of numbers that all are in the format's normal range.

    ``6.02 p + 7.45`` for ``p`` significant bits, see ``relative_variance``. It holds for block
    formats as well, as long as almost no number of a block is below the normal range of its
    elements.
    """
    return -10 * log10(relative_variance(fmt))
