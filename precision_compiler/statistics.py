"""What calibration keeps of a tensor: enough to price any format without running it again."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import gcd, isfinite, prod

import numpy as np
import torch

from precision_compiler.formats import (
    FORMATS,
    Format,
    largest_magnitude,
    quantised,
    rounding_variance,
    scale_exponent,
)

_EXPONENTS = np.arange(-126, 129)  # of the float32 exponent field 1 to 255

METRICS = ("gradient", "tensor", "loss")
"""What an error is measured by: all gradients together, each parameter tensor, the loss."""

SAMPLE = 1 << 14
"""Elements of a tensor that are looked at, at the most; larger tensors are sampled evenly.

The error that follows is good to about 1 % where all elements carry it, 4 % where a tenth do and
13 % where a hundredth do (standard deviations over 60 draws of normal numbers). Reading all
elements of all weights would cost more than the differentiation.
"""

GLANCE = 1 << 12
"""The same for tensors that only their range is asked of."""

COHERENT = 3.0
"""Ratio of signed to independent error from which errors are taken to add up.

Independent errors reach it once in 370 times.
"""


@dataclass(frozen=True)
class Measured:
    """Rounding errors ``d = Q(y) - y`` as they are, weighed by the derivative ``h``.

    Attributes:
        variance: ``sum h^2 d^2``, as if the errors of different elements were independent.
        signed: ``(sum h d)^2``: equal to the variance on average if they are, larger if errors
            of one sign add up.
    """

    variance: float
    signed: float


@dataclass(frozen=True)
class Sensitivity:
    """Binade histogram of one tensor, weighted by what its errors do.

    Attributes:
        weight: per metric (rows, in the order of METRICS) and binade, the sum of ``h^2`` over the
            elements in it, where ``h`` is the derivative of the probe with respect to the
            element. Zeros are in no binade: no format rounds them.
        amax: largest magnitude.
        count: elements per binade among those looked at.
        size: elements of the tensor.
        measured: by format name, the errors of real rounding, where it was done.
    """

    weight: np.ndarray
    amax: float
    count: np.ndarray = field(default_factory=lambda: np.zeros(len(_EXPONENTS)))
    size: int = 0
    measured: Mapping[str, Measured] = field(default_factory=dict)

    def variance(self, fmt: Format, drift: int = 0, metric: int = 0) -> float:
        """Variance of the probe when the tensor is rounded to ``fmt``.

        ``sum h^2 d^2``, with the mean squared rounding error ``d^2`` of each binade, or the
        measured one where the closed form does not hold: formats with a scale, whose values are
        not spread evenly over a binade near the largest number, and single elements. Where errors
        are coherent, it is what they add up to. With ``drift`` the relative errors are those of
        values ``2**drift`` times as large.
        """
        found = self._closed_form(fmt, drift, metric)
        known = self.measured.get(fmt.name)
        coherent = self.is_coherent(fmt)
        if known is None or not (fmt.scaled or self.size == 1 or coherent):
            return found
        expected = self._closed_form(fmt, 0, 0)
        real = known.signed if coherent else known.variance
        return found * real / expected if expected else 0.0

    def signed_ratio(self, fmt: Format) -> float:
        """``|sum h d|`` over the root of ``sum h^2 d^2``: about 1 for independent errors."""
        known = self.measured.get(fmt.name)
        if known is None or known.variance == 0.0:
            return 0.0
        return float((known.signed / known.variance) ** 0.5)

    def is_coherent(self, fmt: Format) -> bool:
        """Whether the errors of rounding to ``fmt`` add up instead of cancelling."""
        return self.signed_ratio(fmt) > COHERENT

    def flushed(self, fmt: Format) -> float:
        """Share of the elements other than zero that round to zero in ``fmt``, 0 to 1.

        0 for block formats: what is lost in a block is small beside the rest of it, and in the
        measured error.
        """
        if fmt.block:
            return 0.0
        lost = _EXPONENTS + self.scale_exponent(fmt) < fmt.min_exponent - fmt.precision
        total = self.count.sum()
        return float(self.count[lost].sum() / total) if total else 0.0

    def scale_exponent(self, fmt: Format) -> int:
        """Power of two that a scaled format multiplies the tensor by to fill its range."""
        return scale_exponent(self.amax, fmt)

    @cached_property
    def is_silent(self) -> bool:
        """Whether nothing that is measured depends on the tensor."""
        return not self.weight.any()

    def _closed_form(self, fmt: Format, drift: int, metric: int) -> float:
        errors = rounding_variance(_EXPONENTS, fmt, self.scale_exponent(fmt) + drift)
        return float(np.dot(self.weight[metric], errors))


@lru_cache(maxsize=512)
def _step(size: int, most: int) -> int:
    """Distance of sampled elements.

    It has no factor of the size, so that it falls into step with no dimension of the tensor.
    """
    step = -(-size // most)
    while gcd(step, size) > 1:
        step += 1
    return step


@lru_cache(maxsize=512)
def _indices(shape: tuple[int, ...], step: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    return torch.unravel_index(torch.arange(0, prod(shape), step, device=device), shape)


def sampled(values: torch.Tensor, most: int = SAMPLE) -> torch.Tensor:
    """A tensor's elements in one row; evenly spaced ones, ``most`` at most, of a larger tensor."""
    still = values.detach()
    step = _step(still.numel(), most) if still.numel() > most else 1
    if step == 1 or still.is_contiguous():
        return still.reshape(-1)[::step].contiguous()
    return still[_indices(tuple(still.shape), step, still.device)]


def binades(row: torch.Tensor) -> torch.Tensor:
    """The exponent field of float32 numbers: 0 for zeros and subnormals, 255 for infinities."""
    return row.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)


def binned(exponents: torch.Tensor, values: torch.Tensor | None = None) -> np.ndarray:
    """Sum of ``values`` (or the count) per binade; zeros and subnormals are left out."""
    found = torch.bincount(exponents, values, minlength=256)
    return found.cpu().numpy()[1:].astype(np.float64)


class Observation:
    """One tensor while its derivatives arrive: the sampled elements and what they become.

    Attributes:
        row: the sampled elements, float32.
        scale: elements of the tensor per sampled one.
        formats: those that it is really rounded to.
    """

    def __init__(
        self, values: torch.Tensor, formats: Iterable[Format] = (), most: int = SAMPLE
    ) -> None:
        self.row, self.size = sampled(values, most), values.numel()
        self.scale = self.size / max(1, self.row.numel())
        self.amax = largest_magnitude(values.detach())
        self.exponents = binades(self.row)
        self.formats = tuple(formats)

    @cached_property
    def count(self) -> np.ndarray:
        """Sampled elements per binade."""
        return binned(self.exponents)

    @cached_property
    def errors(self) -> dict[str, torch.Tensor]:
        """``Q(y) - y`` of every sampled element, by format."""
        return {fmt.name: quantised(self.row, fmt, self.amax) - self.row for fmt in self.formats}

    def weight(self, adjoint: torch.Tensor) -> np.ndarray:
        """``h^2`` by binade over the whole tensor, from sampled derivatives."""
        return binned(self.exponents, adjoint.double().square_()) * self.scale

    def measured(
        self, adjoint: torch.Tensor, errors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, Measured]:
        """The effect of real rounding to every format, from sampled derivatives.

        Args:
            adjoint: derivatives of the sampled elements.
            errors: rounding errors of the sampled elements in further formats, by name.
        """
        found = {}
        for name, error in (self.errors | dict(errors or {})).items():
            moved = adjoint * error
            variance = float(moved.norm(dtype=torch.float64)) ** 2
            signed = float(moved.sum(dtype=torch.float64)) ** 2
            # Errors that agree grow with the number of elements, others with its root.
            agree = signed > COHERENT**2 * variance
            scale = self.scale**2 if agree else self.scale
            if isfinite(signed + variance):  # an overflow is a flag's business, not a number
                found[name] = Measured(variance * self.scale, signed * scale)
        return found


def insensitive(values: torch.Tensor) -> Sensitivity:
    """The record of a float32 tensor that nothing depends on."""
    seen = Observation(values)
    empty = np.zeros((len(METRICS), len(_EXPONENTS)))
    return Sensitivity(empty, seen.amax, seen.count, seen.size)


def sensitivity_of(
    values: torch.Tensor, adjoint: torch.Tensor, formats: Iterable[str] = ()
) -> Sensitivity:
    """The record of a float32 tensor whose probe has one derivative, the same in every metric."""
    seen = Observation(values, [FORMATS[name] for name in formats])
    row = sampled(adjoint)
    weight = np.repeat(seen.weight(row)[None], len(METRICS), axis=0)
    return Sensitivity(weight, seen.amax, seen.count, seen.size, seen.measured(row))


def update_loss(weights: Iterable[torch.Tensor], step: float, fmt: Format) -> float:
    """Share of weights kept in ``fmt`` that an update of a given size leaves where they are.

    Those with ``step < ulp / 2``. Updates of Adam are about as large as the learning rate.
    """
    lost = total = 0.0
    for weight in weights:
        seen = Observation(weight.detach().float())
        spacing = np.exp2(np.maximum(_EXPONENTS, fmt.min_exponent) - fmt.precision + 1.0)
        lost += float(seen.count[step < spacing / 2].sum()) * seen.scale
        total += seen.size
    return lost / total if total else 0.0


Edge = tuple[str, int]
"""A contraction site and the position of one of its arguments."""


@dataclass(frozen=True)
class Correlation:
    """How the effects of one tensor's rounding on two of its readers go together.

    Both read the same rounded copy, so the errors are the same numbers, not independent ones.

    Attributes:
        first, second: the readers.
        weight: per binade, the sum of ``h h'``.
        measured: by format of a scale, ``sum h h' d^2``.
        amax: largest magnitude of the tensor.
    """

    first: Edge
    second: Edge
    weight: np.ndarray
    measured: Mapping[str, float]
    amax: float

    def covariance(self, fmt: Format) -> float:
        """Covariance of the two effects when the tensor is rounded to ``fmt``.

        0 in block formats: readers that sum over other axes have other blocks and other errors.
        """
        if fmt.block:
            return 0.0
        if fmt.scaled and fmt.name in self.measured:
            return self.measured[fmt.name]
        errors = rounding_variance(_EXPONENTS, fmt, scale_exponent(self.amax, fmt))
        return float(np.dot(self.weight, errors))


@dataclass(frozen=True)
class TensorGradient:
    """The gradient of one parameter tensor on the calibration batch.

    Attributes:
        name: the parameter.
        norm: Euclidean norm of its gradient.
        noise: norm of the change of that gradient when every parameter moves by one unit in the
            last place: what float32 itself leaves undecided; 0 where the gradient is so much
            larger that it was not asked.
        elements: number of elements.
    """

    name: str
    norm: float
    noise: float
    elements: int

    @property
    def is_zero(self) -> bool:
        """Whether the gradient is zero by the structure of the model: nothing but float32 noise.

        The bias of attention keys is an example: softmax does not see it.
        """
        return self.norm <= 10 * self.noise or self.norm == 0.0


@dataclass(frozen=True)
class Accumulated:
    """What a running sum in a narrow format does to a contraction.

    Attributes:
        variance: relative variance of the gradient.
        terms: terms of one sign in its sums, on average.
    """

    variance: float
    terms: float


@dataclass(frozen=True)
class Statistics:
    """Everything calibration leaves behind.

    Gradient metrics are relative: a variance of 1 is an error as large as the gradient itself.
    The loss metric is in the loss's own unit.

    Attributes:
        stores: per storage site, for the total effect of the stored tensor.
        operands: per argument of a contraction, for that reading alone.
        internals: per contraction site, for intermediate results inside the operation (the
            probabilities of attention), which are rounded to its format as well.
        correlations: pairs of readings of one tensor.
        exact: storage sites whose rounding changes nothing once all the named sites are kept in
            formats at least as coarse: the operations between them only move, negate, select or
            scale by powers of two.
        ranges: largest magnitude and binade counts of every float32 tensor that is no site, by
            the stable name of its node.
        accumulations: per (contraction site, format), what the target's narrow running sums add
            in that format; empty where it adds up in float32.
        sums: for every reduction, the ratio ``n |mean| / rms`` of what it adds up: the number of
            terms that pull the same way.
        gradient_norm: Euclidean norm of all parameter gradients together, mean of the batches.
        loss: mean value of the loss.
        tensors: the gradient of every parameter tensor.
        noise: standard deviation of the gradient between mini-batches over ``gradient_norm``;
            None if it could not be estimated.
        noise_origin: a sentence on what it was estimated from, or why not.
        batches: calibration batches.
    """

    stores: Mapping[str, Sensitivity]
    operands: Mapping[Edge, Sensitivity]
    internals: Mapping[str, tuple[Sensitivity, ...]]
    correlations: tuple[Correlation, ...] = ()
    exact: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Sensitivity] = field(default_factory=dict)
    accumulations: Mapping[tuple[str, str], Accumulated] = field(default_factory=dict)
    sums: Mapping[str, float] = field(default_factory=dict)
    gradient_norm: float = 1.0
    loss: float = 0.0
    tensors: tuple[TensorGradient, ...] = ()
    noise: float | None = None
    noise_origin: str = "not estimated"
    batches: int = 1


def averaged(found: Sequence[Statistics]) -> Statistics:
    """The mean of statistics of several batches of one model; noise is estimated elsewhere.

    Batches of other shapes may lack tensors that are stored for the first batch.
    """
    first, parts = found[0], len(found)
    if parts == 1:
        return first
    pairs: dict[frozenset[Edge], list[Correlation]] = defaultdict(list)
    for one in found:
        for pair in one.correlations:
            pairs[frozenset((pair.first, pair.second))].append(pair)
    return Statistics(
        {key: _mean([o.stores[key] for o in found if key in o.stores]) for key in first.stores},
        {
            key: _mean([one.operands[key] for one in found if key in one.operands])
            for key in first.operands
        },
        {
            key: tuple(
                map(
                    _mean,
                    zip(*(o.internals[key] for o in found if key in o.internals), strict=True),
                )
            )
            for key in first.internals
        },
        tuple(_mean_correlation(pair, pairs) for pair in first.correlations),
        {
            key: sources
            for key, sources in first.exact.items()
            if all(key in o.exact for o in found)
        },
        {key: _mean([o.ranges[key] for o in found if key in o.ranges]) for key in first.ranges},
        {
            key: _mean_accumulated([one.accumulations.get(key, own) for one in found])
            for key, own in first.accumulations.items()
        },
        {key: max(one.sums[key] for one in found if key in one.sums) for key in first.sums},
        sum(one.gradient_norm for one in found) / parts,
        sum(one.loss for one in found) / parts,
        first.tensors,
        batches=parts,
    )


def _mean(found: Sequence[Sensitivity]) -> Sensitivity:
    def over(pick: str, name: str) -> float:
        return sum(float(getattr(one.measured[name], pick)) for one in found) / len(found)

    names = [name for name in found[0].measured if all(name in one.measured for one in found)]
    return Sensitivity(
        np.mean([one.weight for one in found], axis=0),
        max(one.amax for one in found),
        np.sum([one.count for one in found], axis=0),
        found[0].size,
        {name: Measured(over("variance", name), over("signed", name)) for name in names},
    )


def _mean_accumulated(found: Sequence[Accumulated]) -> Accumulated:
    variance = sum(one.variance for one in found) / len(found)
    return Accumulated(variance, max(one.terms for one in found))


def _mean_correlation(
    first: Correlation, pairs: Mapping[frozenset[Edge], Sequence[Correlation]]
) -> Correlation:
    found = pairs[frozenset((first.first, first.second))]
    return Correlation(
        first.first,
        first.second,
        np.mean([one.weight for one in found], axis=0),
        {name: sum(one.measured[name] for one in found) / len(found) for name in first.measured},
        max(one.amax for one in found),
    )
