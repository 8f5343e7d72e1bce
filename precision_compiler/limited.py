"""A matrix product as tensor cores with a narrow accumulator compute it: a reference emulation."""

import torch

from precision_compiler.errors import FormatError
from precision_compiler.rounding import binade

_TINY = 2.0**-100  # what is far below any product of two 8-bit numbers is cut off


def limited_accumulate(
    a: torch.Tensor,
    b: torch.Tensor,
    every: int | None = 128,
    *,
    fraction_bits: int = 13,
    group: int = 32,
) -> torch.Tensor:
    """``a @ b`` with Hopper's accumulation of fp8 products, promoted to float32 now and then.

    The model (DeepSeek-V3 technical report, section 3.5.2, describes what was observed): one
    instruction adds ``group`` products and the register. All are aligned to the one with the
    largest exponent and cut, toward zero, to ``fraction_bits`` bits below its leading bit; they are
    added exactly and the sum is cut to as many bits. After ``every`` products the register is
    added to a float32 total, rounded to nearest, and starts again from zero.

    Args:
        a: left operand, shape (..., m, k), float32 numbers whose products float32 holds exactly,
            such as those of an 8-bit format, without their scales.
        b: right operand, shape (..., k, n).
        every: products per promotion, a multiple of ``group``; None for one register throughout.
        fraction_bits: bits below the leading one: 13, so 14 significant bits.
        group: products of one instruction.

    Returns:
        The product, shape (..., m, n), float32. A result with an infinity or NaN in it is NaN.
        Memory: ``group`` times the size of the result.

    Raises:
        FormatError: the operands do not fit each other, or ``every`` is no multiple of ``group``.
    """
    if a.shape[-1] != b.shape[-2]:
        raise FormatError(f"inner sizes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    length = a.shape[-1]
    every = every or max(length, 1)
    if every % group and every < length:
        raise FormatError(f"promotion every {every} products: choose a multiple of {group}")
    total = a[..., :0] @ b[..., :0, :]  # zeros of the result's shape
    for start in range(0, length, every):
        register = torch.zeros_like(total)
        for first in range(start, min(start + every, length), group):
            last = min(first + group, start + every, length)
            products = a[..., first:last].unsqueeze(-1) * b[..., first:last, :].unsqueeze(-3)
            terms = torch.cat((products, register.unsqueeze(-2)), -2)
            largest = terms.abs().amax(-2, keepdim=True)
            added = _cut(terms, largest, fraction_bits).sum(-2)  # of few bits, hence exact
            register = _cut(added, added.abs(), fraction_bits)
        total = total + register
    return total


def _cut(x: torch.Tensor, largest: torch.Tensor, fraction_bits: int) -> torch.Tensor:
    """Drop the bits of ``x`` that lie ``fraction_bits`` below the leading one of ``largest``."""
    step = binade(largest).clamp_min_(_TINY).mul_(2.0**-fraction_bits)
    return (x / step).trunc_().mul_(step)
