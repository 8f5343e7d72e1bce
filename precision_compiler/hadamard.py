"""The random Hadamard transform that spreads outliers before a tensor is rounded to 4 bits."""

from math import sqrt

import torch

from precision_compiler.errors import FormatError

SIZE = 16
"""Width of a tile in NVFP4's recipe."""


def hadamard(x: torch.Tensor, axis: int = -1, *, seed: int, size: int = SIZE) -> torch.Tensor:
    """Multiply tiles along an axis by an orthogonal matrix, ``diag(signs) H / sqrt(size)``.

    ``H`` is Sylvester's Hadamard matrix of +-1. The products of a sum over the axis are unchanged
    up to rounding if both operands are transformed with the same seed, and an outlier is spread
    over its tile. NVIDIA, Pretraining Large Language Models with NVFP4 (2025), section 4, applies
    it to both operands of the weight gradient, with one fixed vector of random signs.

    Args:
        x: float32 or float64, any shape; ``size`` has to divide the length of ``axis``.
        axis: the axis that the product sums over.
        seed: of the signs; the same for both operands and for the inverse.
        size: width of a tile, a power of two.

    Returns:
        A tensor of the shape and dtype of ``x``.

    Raises:
        FormatError: tiles do not fit the axis, or the size is no power of two.
    """
    return _multiplied(x, _matrix(seed, size, x), axis)


def inverse_hadamard(
    x: torch.Tensor, axis: int = -1, *, seed: int, size: int = SIZE
) -> torch.Tensor:
    """Undo ``hadamard`` of the same axis, seed and size, up to rounding in ``x``'s dtype."""
    return _multiplied(x, _matrix(seed, size, x).T, axis)


def _matrix(seed: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """``diag(signs) H / sqrt(size)``; its inverse is its transpose."""
    if size < 1 or size & (size - 1):
        raise FormatError(f"a Hadamard matrix of size {size}: choose a power of two")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return (signs * matrix).to(like) / sqrt(size)


def _multiplied(x: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    size = matrix.shape[0]
    if x.shape[axis] % size:
        raise FormatError(f"tiles of {size} do not divide axis {axis} of shape {tuple(x.shape)}")
    last = x.movedim(axis, -1)
    tiles = last.reshape(*last.shape[:-1], -1, size) @ matrix
    made: torch.Tensor = tiles.reshape(last.shape).movedim(-1, axis)
    return made.contiguous()
