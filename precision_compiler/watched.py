"""A tensor whose derivatives are awaited, and what becomes of them."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import numpy as np
import torch

from precision_compiler.formats import Format
from precision_compiler.observation import Observation, binades, binned
from precision_compiler.outliers import Outliers, find_outliers
from precision_compiler.sampling import sampled
from precision_compiler.statistics import (
    METRICS,
    Correlation,
    Edge,
    Measured,
    Sensitivity,
    unweighted,
)

Key = str | Edge
"""Whose derivative: "store" for the total, or that of one reader."""


@dataclass
class Watched:
    """One tensor while its derivatives arrive.

    Attributes:
        value: the tensor.
        amax: its largest magnitude.
        most: elements that are sampled, at the most.
        gradient: samples of the derivatives of the gradient's objective.
        outliers: what those samples do not tell.
        others: of other objectives, which no pairs are made of, ``h^2`` by binade.
    """

    value: torch.Tensor
    amax: float
    most: int
    gradient: dict[Key, torch.Tensor] = field(default_factory=dict)
    outliers: dict[Key, Outliers | None] = field(default_factory=dict)
    others: dict[tuple[Key, int], np.ndarray] = field(default_factory=dict)

    @cached_property
    def row(self) -> torch.Tensor:
        """The sampled elements."""
        return sampled(self.value, self.most)

    @cached_property
    def exponents(self) -> torch.Tensor:
        """Their binades."""
        return binades(self.row)

    def forget(self) -> None:
        """Let go of what can be made again."""
        for name in ("row", "exponents"):
            self.__dict__.pop(name, None)

    def take(self, key: Key, metric: int, adjoint: torch.Tensor) -> None:
        """Look at a derivative that arrived; the tensor itself is not kept."""
        row = sampled(adjoint, self.most)
        if metric == 0:
            self.gradient[key] = row.clone() if row.data_ptr() == adjoint.data_ptr() else row
            self.outliers[key] = find_outliers(self.value, adjoint, row * self.row, self.most)
            return
        scale = self.value.numel() / max(1, row.numel())
        self.others[key, metric] = binned(self.exponents, row.double().square()) * scale

    def observed(self, formats: Sequence[Format]) -> Observation:
        """The tensor as it is rounded to every format."""
        return Observation(self.value, formats, self.most, self.amax)

    @property
    def readers(self) -> list[Key]:
        """Whose derivatives arrived."""
        return list(dict.fromkeys([*self.gradient, *(key for key, _ in self.others)]))

    def sensitivity(
        self, observed: Observation, key: Key, errors: Mapping[str, torch.Tensor]
    ) -> Sensitivity:
        """What arrived of one reader, or in total.

        Args:
            observed: the tensor as it is rounded.
            key: whose derivative.
            errors: rounding errors of the sampled elements in further formats, by name.
        """
        weight, row = unweighted(), self.gradient.get(key)
        measured: Mapping[str, Measured] = {}
        if row is not None:
            weight[0], measured = observed.effects(row, self.outliers[key], errors)
        for metric in range(1, len(METRICS)):
            weight[metric] = self.others.get((key, metric), 0.0)
        return Sensitivity(weight, observed.amax, observed.count, observed.size, measured)

    def _told(self, *keys: Key) -> float:
        """Mean of how much more the readers' errors are than the sample tells."""
        known = [outliers for key in keys if (outliers := self.outliers[key]) is not None]
        return prod(one.whole for one in known) ** (1 / len(keys))

    def correlations(self, observed: Observation) -> Iterator[Correlation]:
        """How the readers go together, pair by pair."""
        edges = [key for key in self.gradient if isinstance(key, tuple)]
        for first, second in itertools.combinations(edges, 2):
            both = self.gradient[first].double() * self.gradient[second] * self._told(first, second)
            effects = (
                (observed.squares @ both * observed.scale).tolist() if observed.formats else []
            )
            yield Correlation(
                first,
                second,
                binned(observed.exponents, both) * observed.scale,
                {
                    fmt.name: effect
                    for fmt, effect in zip(observed.formats, effects, strict=True)
                    if fmt.scaled
                },
                observed.amax,
            )
