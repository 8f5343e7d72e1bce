"""Look at a tensor as it passes: a sample of its elements, and what rounding makes of them."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from math import isfinite, log

import numpy as np
import torch

from precision_compiler.formats import FORMATS, Format, largest_magnitude, quantised
from precision_compiler.sampling import SAMPLE, sampled
from precision_compiler.statistics import (
    COHERENT,
    EXPONENTS,
    METRICS,
    Measured,
    Sensitivity,
    unweighted,
)

_GLANCE, _CHANCE = 1 << 10, 0.01  # elements, and the share of them that may be equal by chance
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
        self.row, self.size = sampled(values, most), values.numel()
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

    def weight(self, adjoint: torch.Tensor) -> np.ndarray:
        """``h^2`` by binade over the whole tensor, from sampled derivatives."""
        return binned(self.exponents, adjoint.double().square()) * self.scale

    def measured(
        self, adjoint: torch.Tensor, errors: Mapping[str, torch.Tensor] | None = None
    ) -> dict[str, Measured]:
        """The effect of real rounding to every format, from sampled derivatives.

        Args:
            adjoint: derivatives of the sampled elements.
            errors: rounding errors of the sampled elements in further formats, by name.
        """
        found = {}
        if self.formats:
            names = [fmt.name for fmt in self.formats]
            found = self._effects(names, adjoint, self.errors, self.squares)
        if errors:
            further = _matrix(errors.values())
            found |= self._effects(errors, adjoint, further, further.square())
        return found

    def _effects(
        self,
        names: Iterable[str],
        adjoint: torch.Tensor,
        errors: torch.Tensor,
        squares: torch.Tensor,
    ) -> dict[str, Measured]:
        wide, found = adjoint.double(), {}
        sums, variances = (errors @ wide).tolist(), (squares @ wide.square()).tolist()
        shared = self._of_twins(errors, wide)
        for name, total, alone, pairs in zip(names, sums, variances, shared, strict=True):
            variance, signed = alone + pairs * self.scale, total * total
            # Errors that agree grow with the number of elements, others with its root.
            if signed > self._doubt * variance:
                signed *= self.scale
            else:
                signed = min(signed, COHERENT**2 * variance)
            if isfinite(signed + variance):  # an overflow is a flag's business, not a number
                found[name] = Measured(variance * self.scale, signed * self.scale, pairs > 0)
        return found

    @property
    def _doubt(self) -> float:
        """How large the square of a sum of random signs has to be, over its mean, to count.

        By chance it exceeds t^2 with a probability of about exp(-t^2 / 2), so as much more is asked
        of samples as makes up for the factor that is at stake.
        """
        return COHERENT**2 + 2 * log(max(1.0, self.scale))

    @cached_property
    def _twins(self) -> torch.Tensor | None:
        """A number for every sampled element, the same for equal ones; None if few are equal."""
        few = self.row[:: -(-len(self.row) // _GLANCE) or 1].sort().values
        equal = (few[1:] == few[:-1]) & (few[1:] != 0)
        if int(equal.sum()) <= _CHANCE * len(few):
            return None
        different, numbers = torch.unique(self.row, return_inverse=True)
        return numbers if len(different) >= _MANY else None

    def _of_twins(self, errors: torch.Tensor, adjoint: torch.Tensor) -> list[float]:
        """Products of the effects of equal elements, by format; 0 where they could be chance.

        Elements that are equal, such as those of a token that occurs again, have equal errors,
        whose effects go together. In a sample of one element in s there is one such pair in s^2.

        Args:
            errors: of each sampled element, a row for every format.
            adjoint: its derivative.
        """
        twins = self._twins
        if twins is None:
            return [0.0] * len(errors)
        effects, groups = errors * adjoint, int(twins.max()) + 1

        def of_others(rows: torch.Tensor) -> torch.Tensor:
            sums = rows.new_zeros(len(rows), groups).index_add_(1, twins, rows)
            return sums[:, twins] - rows

        products = (effects * of_others(effects)).sum(1)
        squares = effects.square()
        chance = 2 * (squares * of_others(squares)).sum(1)
        counts = products > (self._doubt * chance).sqrt()
        found: list[float] = torch.where(counts, products, 0.0).tolist()
        return found


def _matrix(rows: Iterable[torch.Tensor]) -> torch.Tensor:
    """Rows of one length as a matrix, float64."""
    return torch.stack(list(rows)).double()


def insensitive(values: torch.Tensor, most: int = SAMPLE) -> Sensitivity:
    """The record of a float32 tensor that nothing depends on, from ``most`` elements of it."""
    seen = Observation(values, most=most)
    return Sensitivity(unweighted(), seen.amax, seen.count, seen.size)


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
        spacing = np.exp2(np.maximum(EXPONENTS, fmt.min_exponent) - fmt.precision + 1.0)
        lost += float(seen.count[step < spacing / 2].sum()) * seen.scale
        total += seen.size
    return lost / total if total else 0.0
