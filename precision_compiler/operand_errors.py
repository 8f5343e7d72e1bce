"""Rounding errors of a few elements of an operand, without rounding all the others."""

from collections.abc import Sequence
from math import prod

import torch

from precision_compiler.sampling import Places, in_order
from precision_compiler.scaled import block_sizes, elements_under
from precision_compiler.scales import Scales, magnitudes, scales_of
from precision_compiler.scaling import Content, ScaledFormat


class OperandErrors:
    """What recipes make of the sampled elements of one operand.

    Scales depend on all elements: a block's largest magnitude is found once, and those of larger
    blocks and of rows from those of smaller ones. Ask for the recipes with small blocks first.
    """

    def __init__(self, x: torch.Tensor, places: Places, axis: int, content: Content) -> None:
        """Look at an operand.

        Args:
            x: float32, any shape.
            places: of the sampled elements.
            axis: that the product sums over.
            content: what the operand is.
        """
        self._x, self._places, self._axis, self._content = x, places, axis, content
        self._numbers = places.of(x)
        self._largest: dict[tuple[int, ...], torch.Tensor] = {}

    def of(self, how: ScaledFormat, generator: torch.Generator | None = None) -> torch.Tensor:
        """``rounded_operand(x, ...) - x`` at the places, in one row.

        Args:
            how: format or recipe; not one that rotates.
            generator: source of randomness of stochastic rounding; None: torch's own.
        """
        sizes = block_sizes(self._x, how.scaling_of(self._content), self._axis)
        scales = scales_of(self._magnitudes(sizes), how.element, how.scaling_of(self._content))
        block = self._places.blocks(sizes)
        encode, shared = (
            one.reshape(-1).index_select(0, block) for one in (scales.encode, scales.block)
        )
        own = Scales(encode, shared, scales.tensor)
        made = elements_under(self._numbers, own, how, self._content, generator)
        return made.mul_(own.decode).sub_(self._numbers)

    def _magnitudes(self, sizes: tuple[int, ...]) -> torch.Tensor:
        """The largest magnitude of every block, NaN if it holds one.

        Args:
            sizes: of a block along each dimension; those at the end may be smaller.
        """
        if sizes not in self._largest:
            parts = [known for known in self._largest if self._is_made_of(sizes, known)]
            done = max(parts, key=self._volume, default=(1,) * len(sizes))
            found = self._largest.get(done, self._x)
            first = self._axis % len(sizes)
            for axis in sorted(range(len(sizes)), key=lambda one: one != first):
                if done[axis] != sizes[axis]:
                    ratio = -(-sizes[axis] // done[axis])
                    found = _largest_along(found, axis, ratio)
                    done = (*done[:axis], sizes[axis], *done[axis + 1 :])
                    self._largest[done] = found
        return self._largest[sizes]

    def _is_made_of(self, sizes: Sequence[int], parts: Sequence[int]) -> bool:
        trios = zip(sizes, parts, self._x.shape, strict=True)
        return all(size % part == 0 or size >= length for size, part, length in trios)

    def _volume(self, sizes: Sequence[int]) -> int:
        return prod(map(min, sizes, self._x.shape))


def _largest_along(x: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Largest magnitudes of every ``size`` neighbours along an axis, the rest at its end too.

    In the order of memory: reductions of permuted tensors take ten times as long.
    """
    order = in_order(x)
    dense, along = x.permute(order), order.index(axis)
    whole = x.shape[axis] // size * size
    parts = []
    if whole:
        shape = (*dense.shape[:along], whole // size, size, *dense.shape[along + 1 :])
        blocks = dense.narrow(along, 0, whole).view(shape)
        parts.append(magnitudes(blocks, (along + 1,)))
    if whole < x.shape[axis]:
        rest = dense.narrow(along, whole, x.shape[axis] - whole)
        parts.append(magnitudes(rest, (along,), keepdim=True))
    found = parts[0] if len(parts) == 1 else torch.cat(parts, along)
    return found.permute([order.index(dimension) for dimension in range(x.dim())])
