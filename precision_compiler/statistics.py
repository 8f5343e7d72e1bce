"""What calibration keeps of a tensor: enough to price any format without running it again."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from precision_compiler.formats import Format, rounding_variance, scale_exponent

EXPONENTS = np.arange(-126, 129)
"""Binades: those of the float32 exponent field 1 to 255."""

METRICS = ("gradient", "tensor", "loss", "compared")
"""What an error is measured by: all gradients together, each parameter tensor, the loss; and
numbers that are compared, near where that decides."""

COHERENT = 3.0
"""Ratio of signed to independent error from which errors are taken to add up.

Independent errors reach it once in 370 times.
"""


def unweighted() -> np.ndarray:
    """Weights, by metric and binade, of a tensor that nothing is known to depend on."""
    return np.zeros((len(METRICS), len(EXPONENTS)))


@dataclass(frozen=True)
class Measured:
    """Rounding errors ``d = Q(y) - y`` as they are, weighed by the derivative ``h``.

    Attributes:
        variance: ``sum h^2 d^2``, as if the errors of different numbers were independent.
        signed: ``(sum h d)^2``: equal to the variance on average if they are, larger if errors
            of one sign add up.
        shared: whether elements are equal, which then have the same error: the variance has
            ``h h' d^2`` of each pair, too.
    """

    variance: float
    signed: float
    shared: bool = False


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
    count: np.ndarray = field(default_factory=lambda: np.zeros(len(EXPONENTS)))
    size: int = 0
    measured: Mapping[str, Measured] = field(default_factory=dict)

    def variance(self, fmt: Format, drift: int = 0, metric: int = 0) -> float:
        """Variance of the probe when the tensor is rounded to ``fmt``.

        ``sum h^2 d^2``, with the mean squared rounding error ``d^2`` of each binade, or the
        measured one where the closed form does not hold: formats with a scale, whose values are
        not spread evenly over a binade near the largest number, single elements, and elements that
        are equal. Where errors are coherent, it is what they add up to. With ``drift`` the relative
        errors are those of values ``2**drift`` times as large.
        """
        found = self._closed_form(fmt, drift, metric)
        known = self.measured.get(fmt.name)
        coherent = self.is_coherent(fmt)
        if known is None or not (fmt.scaled or self.size == 1 or coherent or known.shared):
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

        0 for formats with scales of rows or blocks: what is lost in a block is small beside the
        rest of it, and in the measured error.
        """
        if fmt.by_axis:
            return 0.0
        lost = EXPONENTS + self.scale_exponent(fmt) < fmt.min_exponent - fmt.precision
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
        errors = rounding_variance(EXPONENTS, fmt, self.scale_exponent(fmt) + drift)
        return float(np.dot(self.weight[metric], errors))


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

        0 where scales are those of rows or blocks: readers that sum over other axes have
        other scales and other errors.
        """
        if fmt.by_axis:
            return 0.0
        if fmt.scaled and fmt.name in self.measured:
            return self.measured[fmt.name]
        errors = rounding_variance(EXPONENTS, fmt, scale_exponent(self.amax, fmt))
        return float(np.dot(self.weight, errors))


@dataclass(frozen=True)
class TensorGradient:
    """The gradient of one parameter tensor on the calibration batch.

    Attributes:
        name: the parameter.
        norm: Euclidean norm of its gradient.
        noise: norm of the change of that gradient when the values that the last products compute
            it from move by one unit in the last place: what float32 itself leaves undecided; 0
            where the gradient is so much larger that it was not asked.
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
        flips: per comparison of computed numbers that chooses, the squares of what flipped
            choices change the gradient by, per distance from the boundary, which is relative to
            the root mean square of the compared numbers.
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
    flips: Mapping[str, float] = field(default_factory=dict)

    @property
    def flip_density(self) -> float:
        """The sum of ``flips``."""
        return sum(self.flips.values())


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
        flips={
            key: sum(one.flips.get(key, density) for one in found) / parts
            for key, density in first.flips.items()
        },
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
        {
            name: Measured(over("variance", name), over("signed", name), over("shared", name) > 0)
            for name in names
        },
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
