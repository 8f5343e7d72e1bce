"""The scales of blocks from the largest magnitudes in them, in float32 arithmetic."""

from dataclasses import dataclass

import torch

from precision_compiler.elements import FORMATS, Format
from precision_compiler.rounding import round_to
from precision_compiler.scaling import Scaling

_BIAS = 127  # of float32 and e8m0 exponents
_MANTISSA = 0x7FFFFF
_LARGEST = FORMATS["fp32"].max_finite


@dataclass(frozen=True, eq=False)
class Scales:
    """Scales of the blocks of one tensor, float32.

    Attributes:
        encode: what numbers are multiplied by before they are rounded, one per block.
        block: what elements are multiplied by to get numbers back, one per block.
        tensor: a further factor of all elements, a single number.
    """

    encode: torch.Tensor
    block: torch.Tensor
    tensor: torch.Tensor

    @property
    def decode(self) -> torch.Tensor:
        """What elements are multiplied by, one per block."""
        return self.block * self.tensor


def magnitudes(x: torch.Tensor, axes: tuple[int, ...], keepdim: bool = False) -> torch.Tensor:
    """Largest magnitudes along some axes, NaN where there is one; no copy of ``x`` is made."""
    highest, lowest = x.amax(axes, keepdim), x.amin(axes, keepdim)
    return torch.maximum(highest, -lowest).abs()  # a zero may have got a sign


def scales_of(amax: torch.Tensor, fmt: Format, scaling: Scaling) -> Scales:
    """Scales for blocks of the given largest magnitudes.

    Args:
        amax: largest magnitude of each block, float32, NaN if the block holds one.
        fmt: format of the elements.
        scaling: the rule; see ``docs/formats.md`` for zero, infinite and undefined magnitudes.
    """
    one = amax.new_ones(())
    if scaling.granularity == "none":
        return Scales(torch.ones_like(amax), torch.ones_like(amax), one)
    if scaling.scale == "e4m3":
        return _two_level_scales(amax, fmt)
    if scaling.scale == "fp32":
        encode = _over(fmt.max_finite, amax).clamp(max=_LARGEST)
        encode = torch.where((amax > 0) & amax.isfinite(), encode, one)
        return Scales(encode, _over(1.0, encode), one)
    exponent = _biased_exponent(amax, fmt, scaling.rounding == "up")
    if scaling.scale == "power_of_two":
        exponent = torch.where((amax > 0) & amax.isfinite(), exponent.clamp(min=1), _BIAS)
        return Scales(_power(2 * _BIAS - exponent), _power(exponent), one)
    if scaling.rounding == "up":
        exponent = torch.where(amax.isinf(), 2 * _BIAS, exponent)
    exponent = exponent.clamp(0, 2 * _BIAS)
    block = torch.where(amax.isnan(), amax, _power(exponent))
    return Scales(_power(2 * _BIAS - exponent), block, one)


def _biased_exponent(amax: torch.Tensor, fmt: Format, up: bool) -> torch.Tensor:
    """Exponent of a power of two, biased by 127, from the bits of the largest magnitude.

    Up: the least k with ``amax / 2^k <= max_finite``, exactly. Floor: ``floor(log2(amax))`` less
    the exponent of ``max_finite`` (OCP Microscaling Formats 1.0, section 6.3).
    """
    bits = amax.view(torch.int32)
    largest = int(torch.tensor(fmt.max_finite).view(torch.int32))
    exponent = (bits >> 23) - (largest >> 23) + _BIAS
    return exponent + ((bits & _MANTISSA) > (largest & _MANTISSA)).int() if up else exponent


def _power(biased: torch.Tensor) -> torch.Tensor:
    """``2.0**(biased - 127)`` as float32 for integers in 0..254; 2^-127 is a subnormal number."""
    return torch.where(biased == 0, 1 << 22, biased << 23).view(torch.float32)


def _two_level_scales(amax: torch.Tensor, fmt: Format) -> Scales:
    """NVFP4's scales, with the operations and in the order of Transformer Engine's kernels.

    With A the tensor's and a the block's largest magnitude, ``S = (448 * 6) / A`` (1 where A is
    0 or infinite), block scale ``s = e4m3(a * (S * (1 / 6)))``, tensor scale ``1 / S``, and
    elements are ``e2m1(x * (1 / (s * (1 / S))))``; every operation rounds to float32, and what
    would be infinite is the largest float32 number (transformer_engine/common/cast/nvfp4/
    core_nvfp4.cuh; torchao differs in keeping s from falling below 2^-6). A block whose scale
    rounds to zero is zero. A NaN anywhere makes the whole tensor NaN.
    """
    narrow = FORMATS["e4m3"]
    whole = amax.amax()
    encode = _over(narrow.max_finite * fmt.max_finite, whole).clamp(max=_LARGEST)
    encode = torch.where((whole == 0) | whole.isinf(), 1.0, encode)
    tensor = _over(1.0, encode)
    sixth = _over(1.0, amax.new_full((), fmt.max_finite))
    block = round_to(amax * (encode * sixth), narrow, saturate=True)
    return Scales(_over(1.0, block * tensor).clamp(max=_LARGEST), block, tensor)


def _over(number: float, x: torch.Tensor) -> torch.Tensor:
    """``number / x`` rounded once; torch's own operator multiplies by a rounded reciprocal."""
    return torch.div(x.new_full((), number), x)
