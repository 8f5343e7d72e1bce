"""Rounding of tensors whose elements share scales: per tensor, row or block."""

from dataclasses import dataclass

import torch

from precision_compiler.elements import Format
from precision_compiler.errors import FormatError
from precision_compiler.hadamard import hadamard, inverse_hadamard
from precision_compiler.rounding import round_in_place, round_stochastically, round_to
from precision_compiler.scales import Scales, magnitudes, scales_of
from precision_compiler.scaling import ROTATED, Content, Rounding, ScaledFormat, Scaling

_LARGE = 2.0**64

ROTATION = 0
"""Seed of the signs of rotated operands: one for all, or products of two would not agree."""


@dataclass(frozen=True, eq=False)
class Quantised:
    """A tensor as it is stored: elements of a narrow format and their scales.

    Attributes:
        elements: numbers of ``fmt`` as float32, in the tensor's shape.
        scales: of each block, float32; the tensor's shape with the number of blocks in place of
            the length of every axis that was cut (1 for whole axes). NVFP4's are e4m3 numbers,
            MX formats' are powers of two or NaN.
        tensor_scale: a further factor of all elements, a single float32 number; 1 but in NVFP4.
        fmt: format of the elements.
        scaling: who shares a scale.
        axis: the axis along which blocks of one dimension and rows lie.
    """

    elements: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    fmt: Format
    scaling: Scaling
    axis: int


@dataclass(frozen=True)
class _Cut:
    """A tensor cut into blocks: each axis that is cut becomes two, blocks and their elements."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def inside(self) -> tuple[int, ...]:
        """The dimensions of a cut tensor that lie inside a block."""
        return tuple(axis + before + 1 for before, axis in enumerate(self.axes))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Cut a tensor; the last block of an axis is filled up with zeros."""
        for axis, size in zip(reversed(self.axes), reversed(self.sizes), strict=True):
            missing = -x.shape[axis] % size
            if missing:
                after = x.new_zeros((*x.shape[:axis], missing, *x.shape[axis + 1 :]))
                x = torch.cat((x, after), axis)
            x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return x

    def join(self, blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Undo ``split``, with the strides that an operation on ``like`` would give."""
        for axis in self.axes:
            blocks = blocks.flatten(axis, axis + 1)
            if blocks.shape[axis] != self.shape[axis]:
                blocks = blocks.narrow(axis, 0, self.shape[axis])
        wanted = torch.empty_like(like, device="meta").stride()
        if blocks.stride() == wanted:
            return blocks
        if like.is_contiguous():  # a graph of tensors without contents has no copy_
            return blocks.clone(memory_format=torch.contiguous_format)
        return torch.empty_like(like).copy_(blocks)


def quantise(
    x: torch.Tensor,
    fmt: Format,
    scaling: Scaling,
    axis: int = -1,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> Quantised:
    """Round a tensor to elements and scales; everything beyond the range saturates.

    Args:
        x: float32, any shape; a length that blocks do not divide ends in a shorter block.
        fmt: a signed format for the elements.
        scaling: who shares a scale, and which.
        axis: the axis that a product with this tensor sums over; blocks and rows lie along it.
        rounding: of elements (scales are rounded as ``scaling`` says): to nearest with ties to
            even, or at random and without bias.
        generator: source of randomness of stochastic rounding; None: torch's own.

    Raises:
        FormatError: ``x`` is not float32, has no such axis or, for blocks of two dimensions,
            has no two last dimensions with ``axis`` among them.
    """
    cut = _cut_of(x, scaling, axis)
    if not x.numel():
        one = x.new_ones(())
        return Quantised(x.clone(), one, one, fmt, scaling, axis)
    blocks = cut.split(x)
    scales = _scales(blocks, fmt, scaling, cut)
    elements = cut.join(_elements(blocks, scales, fmt, rounding, generator), x)
    shared = _squeezed(scales.block, cut)
    return Quantised(elements, shared, scales.tensor, fmt, scaling, axis)


def dequantise(stored: Quantised) -> torch.Tensor:
    """The numbers that a stored tensor stands for, float32: ``elements * (scale * tensor)``."""
    if not stored.elements.numel():
        return stored.elements.clone()
    cut = _cut_of(stored.elements, stored.scaling, stored.axis)
    scales = stored.scales * stored.tensor_scale
    for dimension in cut.inside:
        scales = scales.unsqueeze(dimension)
    return cut.join(cut.split(stored.elements) * scales, stored.elements)


def rounded(
    x: torch.Tensor,
    fmt: Format,
    scaling: Scaling,
    axis: int = -1,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """``dequantise(quantise(...))`` in one go: what hardware makes of ``x``, in float32."""
    cut = _cut_of(x, scaling, axis)
    if not x.numel():
        return x.clone()
    blocks = cut.split(x)
    scales = _scales(blocks, fmt, scaling, cut)
    made = _elements(blocks, scales, fmt, rounding, generator).mul_(scales.decode)
    return cut.join(made, x)


def rounded_operand(
    x: torch.Tensor,
    how: ScaledFormat,
    axis: int,
    content: Content,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """What a recipe makes of an operand of a product, float32.

    A rotated operand is rotated back: the product of two operands that both are rotated is the
    same up to the order of its sums.

    Args:
        x: float32, any shape.
        how: format or recipe.
        axis: that the product sums over.
        content: what the operand is.
        generator: source of randomness of stochastic rounding; None: torch's own.
    """
    made = rounded(
        _turned(x, how, axis), how.element, how.scaling_of(content), axis,
        rounding=_rounding(how, content), generator=generator,
    )  # fmt: skip
    return inverse_hadamard(made, axis, seed=ROTATION, size=ROTATED) if how.rotated else made


def quantised_operand(x: torch.Tensor, how: ScaledFormat, content: Content) -> Quantised:
    """An operand as a recipe stores it, rotated ones rotated; the product sums over its last axis.

    Args:
        x: float32, any shape.
        how: format or recipe.
        content: what the operand is.
    """
    scaling, rounding = how.scaling_of(content), _rounding(how, content)
    return quantise(_turned(x, how, -1), how.element, scaling, rounding=rounding)


def _turned(x: torch.Tensor, how: ScaledFormat, axis: int) -> torch.Tensor:
    return hadamard(x, axis, seed=ROTATION, size=ROTATED) if how.rotated else x


def _rounding(how: ScaledFormat, content: Content) -> Rounding:
    return how.gradients if content == "gradient" else "nearest"


def block_sizes(x: torch.Tensor, scaling: Scaling, axis: int) -> tuple[int, ...]:
    """Elements along each dimension that share a scale: 1 where blocks do not extend.

    Raises:
        FormatError: as ``quantise``.
    """
    cut = _cut_of(x, scaling, axis)
    sizes = dict(zip(cut.axes, cut.sizes, strict=True))
    return tuple(sizes.get(dimension, 1) for dimension in range(x.dim()))


def elements_under(
    x: torch.Tensor,
    scales: Scales,
    how: ScaledFormat,
    content: Content,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Numbers rounded to the elements of a recipe under known scales, in a new tensor.

    Args:
        x: float32.
        scales: of every element, or of shapes that broadcast to ``x``.
        how: format or recipe.
        content: what the numbers are.
        generator: source of randomness of stochastic rounding; None: torch's own.
    """
    return _elements(x, scales, how.element, _rounding(how, content), generator)


def _squeezed(scales: torch.Tensor, cut: _Cut) -> torch.Tensor:
    for dimension in reversed(cut.inside):
        scales = scales.squeeze(dimension)
    return scales


def _cut_of(x: torch.Tensor, scaling: Scaling, axis: int) -> _Cut:
    if x.dtype != torch.float32:
        raise FormatError(f"scaled formats round float32 tensors, not {x.dtype}: convert it first")
    shape, dimensions = tuple(x.shape), x.dim()
    whole = scaling.granularity in ("none", "tensor")
    if not whole and not -dimensions <= axis < dimensions:
        raise FormatError(f"axis {axis} is none of a tensor of shape {shape}")
    if scaling.granularity == "block2d" and (dimensions < 2 or axis % dimensions < dimensions - 2):
        raise FormatError(f"square blocks lie in the last two dimensions, not along axis {axis}")
    axes: tuple[int, ...] = (axis % dimensions,) if not whole else tuple(range(dimensions))
    if scaling.granularity == "block2d":
        axes = (dimensions - 2, dimensions - 1)
    return _Cut(shape, axes, tuple(scaling.size or shape[axis] for axis in axes))


def _scales(blocks: torch.Tensor, fmt: Format, scaling: Scaling, cut: _Cut) -> Scales:
    if scaling.granularity == "none":
        amax = blocks.new_ones((1,) * blocks.dim())
    else:
        amax = magnitudes(blocks, cut.inside, keepdim=True)
    return scales_of(amax, fmt, scaling)


def _elements(
    blocks: torch.Tensor,
    scales: Scales,
    fmt: Format,
    rounding: Rounding,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Elements of cut blocks, in a new tensor."""
    inside = blocks * scales.encode
    if rounding == "stochastic":
        return round_stochastically(inside, fmt, generator)
    if fmt.max_finite >= _LARGE:
        return round_to(inside, fmt, saturate=True)
    return round_in_place(inside.clamp_(-fmt.max_finite, fmt.max_finite), fmt, blocks)
