"""How much the gradient differs from one mini-batch to the next.

With n gradients of equal batches, ``sum ||g_i - mean||^2 / (n - 1)`` estimates the trace of the
gradient's covariance without bias; for a batch of B samples made of parts of b samples, the
covariance of the whole is b / B that of a part (samples drawn independently; McCandlish et al.,
An Empirical Model of Large-Batch Training, 2018, appendix A).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from precision_compiler.errors import CaptureError

MOST_PARTS = 2
"""The spread is a sum over all elements: two parts tell it as well as more, in less time."""

_NEAR = 0.25  # relative difference between the norms of gradients that are taken to be the same

Gradients = Callable[[Any], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Noise:
    """Standard deviation of the gradient between mini-batches.

    Attributes:
        deviation: root of the trace of the covariance, in the gradient's unit; None if unknown.
        origin: a sentence on what it was estimated from, or why it was not.
    """

    deviation: float | None
    origin: str


@dataclass
class GradientSums:
    """Running sums of gradients, from which their spread follows."""

    count: int = 0
    squares: float = 0.0
    total: list[torch.Tensor] = field(default_factory=list)

    def add(self, gradients: Iterable[torch.Tensor]) -> None:
        """Take one more gradient into account."""
        values = [gradient.detach() for gradient in gradients]
        self.squares += _square(values)
        if not self.total:
            self.total = [value.float().clone() for value in values]
        else:
            for total, value in zip(self.total, values, strict=True):
                total += value
        self.count += 1

    @property
    def mean_norm(self) -> float:
        """Norm of the mean gradient."""
        return float(_square(self.total) ** 0.5 / self.count)

    @property
    def variance(self) -> float:
        """Unbiased estimate of the covariance's trace, from two gradients or more."""
        around = self.squares - self.count * self.mean_norm**2
        return max(0.0, around) / (self.count - 1)


def _square(values: Sequence[torch.Tensor]) -> float:
    return sum(float(torch.linalg.vector_norm(v, dtype=torch.float64)) ** 2 for v in values)


def batch_noise(sums: GradientSums) -> Noise:
    """The noise as the calibration batches show it."""
    return Noise(sums.variance**0.5, f"{sums.count} calibration batches")


def noise_of_parts(batch: Any, gradients: Gradients, norm: float) -> Noise:
    """The noise of a batch as its parts show it.

    Args:
        batch: what the model is called with.
        gradients: the parameters' gradients on another batch.
        norm: norm of the gradient on the whole batch; the parts' mean must come near it, or
            the loss does not go with the parts (it holds on to labels of the whole batch).
    """
    size = _batch_size(batch)
    if size is None or size < 2:
        return Noise(None, "the batch cannot be split into parts: pass calibration batches")
    parts = min(size, MOST_PARTS)
    each, sums = size // parts, GradientSums()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as those of broadcast labels: checked below
            for start in range(0, parts * each, each):
                sums.add(gradients(_part(batch, size, start, each)))
    except CaptureError as error:
        return Noise(None, f"the loss fails on parts of the batch ({error})")
    origin, ratio = f"{parts} parts of the batch, {each} each", sums.mean_norm / norm
    if abs(ratio - 1) < _NEAR:  # the loss is a mean over samples
        return Noise((sums.variance * each / size) ** 0.5, origin)
    if abs(ratio * size / each - 1) < _NEAR:  # it is a sum
        return Noise((sums.variance * size / each) ** 0.5, origin)
    return Noise(None, "parts of the batch have another mean gradient: pass calibration batches")


def _batch_size(batch: Any) -> int | None:
    """The common leading size of a batch's tensors; those of size 1 are shared by all samples."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    sizes = {leaf.shape[0] for leaf in leaves if leaf.dim() > 0} - {1}
    return sizes.pop() if len(sizes) == 1 else None


def _part(batch: Any, size: int, start: int, length: int) -> Any:
    def cut(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.dim() > 0 and leaf.shape[0] == size:
            return leaf[start : start + length]
        return leaf

    return pytree.tree_map(cut, batch)
