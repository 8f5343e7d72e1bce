"""What a running sum in a narrow format adds to the error of a contraction.

A sum kept in a format is rounded whenever products have been added to it; with partial sums S_j
and independent roundings that is a variance of ``sum_j ulp(S_j)^2 / 12`` per result. Terms smaller
than half an ulp of a sum of one sign are lost altogether, which no variance describes.
"""

from dataclasses import dataclass

import torch

from precision_compiler.formats import Format, ulp

RESULTS = 256
"""Results of a contraction whose partial sums are worked out."""


@dataclass(frozen=True)
class Accumulator:
    """How a machine adds up the products of a contraction.

    Attributes:
        fmt: format of the running sum.
        every: products added exactly before the sum is rounded to it.
    """

    fmt: Format
    every: int


def partial_sum_variance(terms: torch.Tensor, accumulator: Accumulator) -> torch.Tensor:
    """Variance of sums over the last dimension, shape ``terms.shape[:-1]``, float64."""
    partial = terms.double().cumsum(-1)[..., accumulator.every - 1 :: accumulator.every]
    return (ulp(partial, accumulator.fmt).square() / 12).sum(-1)


def same_sign_terms(terms: torch.Tensor) -> float:
    """``n |mean| / rms`` of the terms of a sum, mean over the sums: those that pull one way."""
    wide = terms.double()
    rms = wide.square().mean(-1).sqrt()
    ratio = torch.where(rms > 0, terms.shape[-1] * wide.mean(-1).abs() / rms, 0.0)
    return float(ratio.mean())


def products(
    first: torch.Tensor, second: torch.Tensor, results: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """The terms of chosen results of a matrix product, shape (results, inner size).

    Args:
        first: left operand, (m, k) or (b, m, k).
        second: right operand, (k, n) or (b, k, n).
        results: flat indices into the product.
        shape: shape of the product.
    """
    *batch, row, column = torch.unravel_index(results, shape)
    return first[(*batch, row)] * second.transpose(-1, -2)[(*batch, column)]
