"""Look at a tensor as it passes: a sample of its elements, and what rounding makes of them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from math import isfinite, log

import numpy as np
import torch

from precision_compiler.formats import (
    CHOICES,
    FORMATS,
    Format,
    largest_magnitude,
    quantised,
    relative_variance,
)
from precision_compiler.outliers import Outliers, find_outliers
from precision_compiler.sampling import GLANCE, REPEATED, SAMPLE, sampled
from precision_compiler.statistics import (
    COHERENT,
    EXPONENTS,
    METRICS,
    Measured,
    Sensitivity,
    unweighted,
)

_CHANCE = 0.01  # share of the elements that may be equal by chance
_MAY_BE_CHANCE = COHERENT**2 * (1 - 1e-9)  # signed square over variance; float64 rounds, too
_CASES = 1000  # of which not even one may seem coherent by chance
_NOTHING = np.zeros((3, 0))
_MANY = 1 << 8  # different numbers, below which errors are a few draws, which is for `signed`


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
        most: how many they may be; above SAMPLE, equal ones are looked for.
        scale: elements of the tensor per sampled one.
        amax: largest magnitude of the tensor.
        formats: those that it is really rounded to.
    """

    def __init__(
        self,
        values: torch.Tensor,
        formats: Iterable[Format] = (),
        most: int = SAMPLE,
        amax: float | None = None,
    ) -> None:
        self.row, self.size, self.most = sampled(values, most), values.numel(), most
        self.scale = self.size / max(1, self.row.numel())
        self.amax = largest_magnitude(values.detach()) if amax is None else amax
        self.exponents = binades(self.row)
        self.formats = tuple(formats)

    @cached_property
    def count(self) -> np.ndarray:
        """Sampled elements per binade."""
        return binned(self.exponents)

    @cached_property
    def errors(self) -> torch.Tensor:
        """``Q(y) - y`` of every sampled element, a row for every format, float64."""
        return _matrix(quantised(self.row, fmt, self.amax) - self.row for fmt in self.formats)

    @cached_property
    def squares(self) -> torch.Tensor:
        """Squares of ``errors``."""
        return self.errors.square()

    @property
    def insensitive(self) -> Sensitivity:
        """The record of the tensor if nothing depends on it."""
        return Sensitivity(unweighted(), self.amax, self.count, self.size)

    def weight(self, adjoint: torch.Tensor) -> np.ndarray:
        """``h^2`` by binade over the whole tensor, from sampled derivatives."""
        return binned(self.exponents, adjoint.double().square()) * self.scale

    def measured(self, adjoint: torch.Tensor) -> dict[str, Measured]:
        """The effect of real rounding to every format, from sampled derivatives."""
        return _named([fmt.name for fmt in self.formats], self._of_formats(adjoint.double()))

    def effects(
        self,
        adjoint: torch.Tensor,
        outliers: Outliers | None,
        errors: Mapping[str, torch.Tensor],
    ) -> tuple[np.ndarray, dict[str, Measured]]:
        """``weight`` and ``measured``, with what the sample does not tell.

        Args:
            adjoint: derivatives of the sampled elements.
            outliers: what the sample does not tell, if anything.
            errors: rounding errors of the sampled elements, or every second of them, in further
                formats, by name. Those of outliers are not known: they are taken to be those of
                normal numbers.
        """
        wide, names = adjoint.double(), [*(fmt.name for fmt in self.formats), *errors]
        if outliers is None:
            return self.weight(wide), _named(names, self._of_all(wide, errors))
        rest = wide if outliers.others is None else wide * outliers.others
        weight = self.weight(rest) * outliers.rest
        found = _times(self._of_all(rest, errors), outliers.rest)
        if outliers.others is not None:
            few, more = Observation(outliers.values, self.formats, amax=self.amax), outliers.lacking
            weight += few.weight(outliers.adjoint) * (1.0 + more)
            effect = float((outliers.values.double() * outliers.adjoint).square().sum())
            guess = effect * np.array([relative_variance(CHOICES[name]) for name in errors])
            known = few._of_formats(outliers.adjoint.double())
            known = np.concatenate([known, np.stack([guess, guess, 0.0 * guess])], axis=1)
            found += _times(known, 1.0 + more)
        return weight, _named(names, found)

    def _of_all(self, adjoint: torch.Tensor, errors: Mapping[str, torch.Tensor]) -> np.ndarray:
        found = self._of_formats(adjoint)
        if not errors:
            return found
        further = self._of_errors(_matrix(errors.values()), adjoint)
        return np.concatenate([found, further], axis=1)

    def _of_formats(self, adjoint: torch.Tensor) -> np.ndarray:
        if not self.formats:
            return _NOTHING
        return self._of_errors(self.errors, adjoint, self.squares)

    def _of_errors(
        self, errors: torch.Tensor, adjoint: torch.Tensor, squares: torch.Tensor | None = None
    ) -> np.ndarray:
        """Variance, signed square and products of equal elements (rows) by format (columns).

        Args:
            errors: of each sampled element, or of every second, a row for every format.
            adjoint: derivatives of all sampled elements, float64.
            squares: of the errors, if known.
        """
        squares = errors.square() if squares is None else squares
        every = -(-len(adjoint) // errors.shape[1])
        scale, adjoint = self.scale * every, adjoint[::every]
        pairs = self._of_twins(errors, adjoint, every)
        signed = (errors @ adjoint).square().cpu().numpy()
        variance = (squares @ adjoint.square()).cpu().numpy() + pairs * scale
        # Errors that agree grow with the number of elements, others with its root.
        coherent = signed > _doubt(scale) * variance
        signed = np.where(coherent, signed * scale, np.minimum(signed, _MAY_BE_CHANCE * variance))
        return np.stack([variance, signed, pairs]) * scale

    @cached_property
    def _twins(self) -> torch.Tensor | None:
        """A number for every sampled element, the same for equal ones; None if few are equal."""
        if self.most <= SAMPLE:
            return None
        different, numbers = torch.unique(self.row, return_inverse=True)
        return numbers if len(different) >= _MANY else None

    def _of_twins(self, errors: torch.Tensor, adjoint: torch.Tensor, every: int) -> np.ndarray:
        """Products of the effects of equal elements, by format; 0 where they could be chance.

        Elements that are equal, such as those of a token that occurs again, have equal errors,
        whose effects go together. In a sample of one element in s there is one such pair in s^2.

        Args:
            errors: of sampled elements, a row for every format.
            adjoint: their derivatives.
            every: 1 for all sampled elements, 2 for every second one.
        """
        if self._twins is None:
            return np.zeros(len(errors))
        twins = self._twins[::every]
        effects, groups = errors * adjoint, int(twins.max()) + 1

        def of_others(rows: torch.Tensor) -> torch.Tensor:
            sums = rows.new_zeros(len(rows), groups).index_add_(1, twins, rows)
            return sums[:, twins] - rows

        products = (effects * of_others(effects)).sum(1)
        squares = effects.square()
        chance = 2 * (squares * of_others(squares)).sum(1)
        counts = products > (_doubt(self.scale * every) * chance).sqrt()
        found: np.ndarray = torch.where(counts, products, 0.0).cpu().numpy()
        return found


def _doubt(scale: float) -> float:
    """How large the square of a sum of random signs has to be, over its mean, to count.

    By chance it exceeds t^2 with a probability of about exp(-t^2 / 2), so as much more is asked of
    samples of one in ``scale`` as makes up for the factor that is at stake, and for the thousands
    of tensors and formats that are looked at: each case in which chance won would be an error ten
    times too large.
    """
    return COHERENT**2 + 2 * log(scale * _CASES) if scale > 1 else COHERENT**2


def _times(found: np.ndarray, factor: float) -> np.ndarray:
    """What ``_of_errors`` found, of so many times the elements that count.

    Coherent errors are left alone: those are many small elements that are lost, not the large ones.
    """
    variance, signed, pairs = found
    coherent = signed > COHERENT**2 * variance
    return np.stack(
        [variance * factor, np.where(coherent, signed, signed * factor), pairs * factor]
    )


def _named(names: Sequence[str], found: np.ndarray) -> dict[str, Measured]:
    """What ``_of_errors`` found, by format; an overflow is a flag's business, not a number."""
    columns = zip(names, found.T.tolist(), strict=True)
    return {
        name: Measured(variance, signed, pairs > 0)
        for name, (variance, signed, pairs) in columns
        if isfinite(variance + signed)
    }


def _matrix(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Rows of one length as a matrix, float64."""
    return torch.stack(list(rows)).double()


def how_many(glance: torch.Tensor) -> int:
    """How many elements of a tensor are to be looked at: more where equal ones may be among them.

    Of pairs of equal elements, a sample of one in s has one in s^2.

    Args:
        glance: the tensor, sampled with at most GLANCE elements.
    """
    few = np.sort(glance.cpu().numpy())
    equal = (few[1:] == few[:-1]) & (few[1:] != 0)
    return REPEATED if equal.sum() > _CHANCE * len(few) else SAMPLE


def sensitivity_of(
    values: torch.Tensor, adjoint: torch.Tensor, formats: Iterable[str] = ()
) -> Sensitivity:
    """The record of a float32 tensor whose probe has one derivative, the same in every metric."""
    most = how_many(sampled(values, GLANCE))
    seen, row = Observation(values, map(FORMATS.__getitem__, formats), most), sampled(adjoint, most)
    outliers = find_outliers(values, adjoint, seen.row * row, most)
    weight, measured = seen.effects(row, outliers, {})
    rows = np.repeat(weight[None], len(METRICS), axis=0)
    return Sensitivity(rows, seen.amax, seen.count, seen.size, measured)


def update_loss(weights: Iterable[torch.Tensor], step: float, fmt: Format) -> float:
    """Share of weights kept in ``fmt`` that an update of a given size leaves where they are.

    Those with ``step < ulp / 2``. Updates of Adam are about as large as the learning rate.
    """
    lost = total = 0.0
    for weight in weights:
        seen = Observation(weight.detach().float(), most=REPEATED)
        spacing = np.exp2(np.maximum(EXPONENTS, fmt.min_exponent) - fmt.precision + 1.0)
        lost += float(seen.count[step < spacing / 2].sum()) * seen.scale
        total += seen.size
    return lost / total if total else 0.0
