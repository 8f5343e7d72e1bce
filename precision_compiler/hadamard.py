"""The random Hadamard transform that spreads outliers before a tensor is rounded to 4 bits."""

from math import sqrt
from random import Random

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
    tiles = _tiles(x, axis, size)
    return _put_back(_transformed(tiles * _signs(seed, size, x)), x, axis)


def inverse_hadamard(
    x: torch.Tensor, axis: int = -1, *, seed: int, size: int = SIZE
) -> torch.Tensor:
    """Undo ``hadamard`` of the same axis, seed and size, up to rounding in ``x``'s dtype."""
    tiles = _tiles(x, axis, size)
    return _put_back(_transformed(tiles) * _signs(seed, size, x), x, axis)


def _signs(seed: int, size: int, like: torch.Tensor) -> torch.Tensor:
    """Signs from the bits of a random number: operations that a graph can hold, no constant."""
    bits = Random(seed).getrandbits(size)
    places = torch.arange(size, device=like.device)
    return 1 - 2 * ((bits >> places) & 1).to(like.dtype)


def _transformed(tiles: torch.Tensor) -> torch.Tensor:
    """The last axis times ``H / sqrt(size)``, as sums and differences of halves."""
    shape, size = tiles.shape, tiles.shape[-1]
    half = size // 2
    while half:
        first, second = tiles.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        tiles = torch.stack((first + second, first - second), -2)
        half //= 2
    return tiles.reshape(shape) / sqrt(size)


def _tiles(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    if size < 1 or size & (size - 1):
        raise FormatError(f"a Hadamard matrix of size {size}: choose a power of two")
    if x.shape[axis] % size:
        raise FormatError(f"tiles of {size} do not divide axis {axis} of shape {tuple(x.shape)}")
    last = x.movedim(axis, -1)
    return last.reshape(*last.shape[:-1], -1, size)


def _put_back(tiles: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    made: torch.Tensor = tiles.reshape(x.movedim(axis, -1).shape).movedim(-1, axis)
    return made.clone(memory_format=torch.contiguous_format)
