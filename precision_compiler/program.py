"""The mixed-integer program of a decision problem, and HiGHS on it."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from math import isfinite
from operator import eq

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from precision_compiler.formats import CHOICES
from precision_compiler.links import Link
from precision_compiler.problem import (
    Problem,
    argument_format,
    entry_format,
    fixes_result,
    result_format,
)

_RELIEF = 100.0  # a rounding of more times the limit would need errors that cancel to 99 %
EDGES = (1.0, 1.0 - 3e-6)
"""Shares of a budget to allow: the solver keeps constraints to 1e-6, so what it finds for all of
the budget may be beyond it; then it is asked again for a little less."""


class Program:
    """The mixed-integer program of a problem, built row by row."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.columns: dict[tuple[str, ...], int] = {}
        self.costs: list[float] = []
        self.noise: list[float] = []
        self.binary: list[int] = []
        self.relieved: dict[int, float] = {}  # what others may make up for: times _RELIEF, at most
        self.rows: list[dict[int, float]] = []
        self.lowest: list[float] = []
        self.highest: list[float] = []
        self._sites()
        self._results()
        self._reads()
        self._copies_of_exact_sources()
        self._pairs()
        self._memory()

    def minimise(
        self, limit: float, gap: float, seconds: float
    ) -> tuple[dict[str, str], float] | None:
        """The fastest assignment of at most some variance, and a proven bound on its time.

        Args:
            limit: largest variance in total.
            gap: relative gap to stop at.
            seconds: time limit.

        Returns:
            None if nothing fits, or nothing was found in time.
        """
        shares, barred = np.array(self.noise), self.barred(limit)
        costs = np.array(self.costs)
        if not (isfinite(limit) and limit > 0):
            return self._solve(costs, barred, [], gap, seconds)
        shares, proven = np.where(barred, 0.0, shares) / limit, -np.inf
        for most in EDGES:
            budget = LinearConstraint(shares, -np.inf, most)
            found = self._solve(costs, barred, [budget], gap, seconds)
            if found is None:
                continue
            proven = found[1] if most == 1.0 else proven  # what is proven for less is too much
            if self.problem.variance(found[0]) <= limit * (1 + 1e-9):
                return found[0], proven
        return None

    def weighed(
        self,
        rate: float,
        limit: float,
        most: float,
        seconds: float,
        window: tuple[float, float] = (-np.inf, np.inf),
    ) -> tuple[dict[str, str], float] | None:
        """The assignment of least ``time + rate * variance``, and a proven bound on that sum.

        Args:
            rate: seconds that a unit of variance costs.
            limit: variance that the assignment is part of: it bars what ``minimise`` bars.
            most: a sum that is known to be reached; what exceeds it on its own is left out.
            seconds: time limit.
            window: least and largest variance of the assignment itself. One below the least is
                not excluded, but judged as if it were there.
        """
        noise, barred = np.array(self.noise), self.barred(limit)
        if not self.is_signed:
            barred |= rate * noise > most - self.floor + 1e-9 * abs(most)
        further = []
        low, high = window
        if isfinite(high) and high > 0:
            shares = np.where(barred, 0.0, noise) / high
            further.append(LinearConstraint(shares, low / high, 1.0))
        costs = np.array(self.costs) + rate * noise
        return self._solve(costs, barred, further, 0.0, seconds)

    def quietest(
        self, within: float = np.inf, limit: float = np.inf, seconds: float = np.inf
    ) -> tuple[dict[str, str], float] | None:
        """The legal assignment of least variance and a bound on that; None if none is legal.

        Args:
            within: seconds that it may take.
            limit: a variance that is known to be reached: what exceeds it on its own is left out.
            seconds: time limit of the solver.
        """
        costs, further = np.array(self.costs), []
        if 0.0 < within < np.inf:
            further.append(LinearConstraint(costs / within, -np.inf, 1.0))
        return self._solve(np.array(self.noise), self.barred(limit), further, 0.0, seconds)

    @cached_property
    def is_signed(self) -> bool:
        """Whether some roundings may make up for others."""
        return min(self.noise) < 0.0

    @cached_property
    def floor(self) -> float:
        """Seconds that no assignment goes below: every site at its fastest, no copies."""
        fastest: dict[str, float] = {}
        for key, column in self.columns.items():
            if key[0] == "site":
                fastest[key[1]] = min(self.costs[column], fastest.get(key[1], np.inf))
        return sum(fastest.values())

    def barred(self, limit: float) -> np.ndarray:
        """Columns that break a limit on their own: beside them the tolerance would hide others.

        Those that others may make up for may be more than the limit, but not arbitrarily so.
        """
        noise = np.array(self.noise)
        found = noise > limit * (1 + 1e-9)
        relieved = list(self.relieved)
        most = _RELIEF * limit * np.array(list(self.relieved.values()))
        found[relieved] = noise[relieved] > most
        return np.asarray(found)

    @cached_property
    def fingerprint(self) -> tuple[object, ...]:
        """Equal for programs that differ in nothing but the names of their sites."""
        matrix = self.matrix
        arrays = (matrix.data, matrix.indices, matrix.indptr, self.lowest, self.highest)
        numbers = (self.costs, self.noise, self.binary, list(self.relieved.items()))
        formats = tuple(self.problem.options.values())
        return formats, *(np.asarray(array).tobytes() for array in (*arrays, *numbers))

    def _solve(
        self,
        costs: np.ndarray,
        barred: np.ndarray,
        further: Sequence[LinearConstraint],
        gap: float,
        seconds: float,
    ) -> tuple[dict[str, str], float] | None:
        # HiGHS works with absolute tolerances: keep numbers near 1.
        scale = float(np.abs(np.where(barred, 0.0, costs)).max()) or 1.0
        result: OptimizeResult = milp(
            np.where(barred, 0.0, costs) / scale,
            integrality=np.array(self.binary),
            bounds=Bounds(0, np.where(barred, 0.0, 1.0)),
            constraints=[LinearConstraint(self.matrix, self.lowest, self.highest), *further],
            options={"mip_rel_gap": gap, "time_limit": seconds},
        )
        if result.x is None:
            return None
        chosen = {
            key[1]: key[2]
            for key, column in self.columns.items()
            if key[0] == "site" and result.x[column] > 0.5
        }
        return chosen, float(result.mip_dual_bound) * scale

    def _column(self, key: tuple[str, ...], cost: float, noise: float, binary: bool) -> int:
        if key not in self.columns:
            self.columns[key] = len(self.costs)
            self.costs.append(cost)
            self.noise.append(noise)
            self.binary.append(int(binary))
        return self.columns[key]

    def _row(self, terms: dict[int, float], low: float, high: float = np.inf) -> None:
        self.rows.append(terms)
        self.lowest.append(low)
        self.highest.append(high)

    @cached_property
    def matrix(self) -> csr_array:
        """Coefficients of all rows but the budget's."""
        entries = [
            (value, row, column)
            for row, terms in enumerate(self.rows)
            for column, value in terms.items()
        ]
        values, rows, columns = zip(*entries, strict=True)
        return csr_array((values, (rows, columns)), shape=(len(self.rows), len(self.costs)))

    def _sites(self) -> None:
        problem, links = self.problem, self.problem.links
        for name, formats in problem.options.items():
            stored = name in links.stores
            prices = problem.prices.stores if stored else problem.prices.contractions
            noise = problem.store_variance if stored else problem.internal_variance
            own = 0.0 if problem.exact_sources(name) else 1.0  # counted where it is rounded
            chosen = [
                self._column(("site", name, fmt), prices[name][fmt], own * noise(name, fmt), True)
                for fmt in formats
            ]
            self._row(dict.fromkeys(chosen, 1.0), 1.0, 1.0)

    def _memory(self) -> None:
        """What is kept for the backward pass has a limit; numbers are shares of it."""
        problem = self.problem
        if not isfinite(problem.most_bytes):
            return
        terms = {
            self.columns["site", store, fmt]: size * CHOICES[fmt].bytes / problem.most_bytes
            for store, size in problem.saved.elements.items()
            for fmt in problem.options[store]
        }
        self._row(terms, -np.inf, 1.0 - problem.saved.other / problem.most_bytes)

    def _results(self) -> None:
        """A contraction in bf16 or fp16 writes that format; in float32 it writes float32 first."""
        for name, stores in self.problem.links.results.items():
            for fmt in self.problem.options[name]:
                if fmt == "fp32" or not fixes_result(fmt):
                    continue
                own = self.columns["site", name, fmt]
                for store in stores:
                    kept = self.columns.get(("site", store, fmt))
                    terms = {own: -1.0} if kept is None else {kept: 1.0, own: -1.0}
                    self._row(terms, 0.0)
        for store, writer in self.problem.links.writer.items():
            self._conversions(store, writer)

    def _conversions(self, store: str, writer: str) -> None:
        """Keeping a result in another format than it comes in takes a copy."""
        problem, source = self.problem, self.problem.links.stores[store].node
        for kept in problem.options[store]:
            fitting = {
                self.columns["site", writer, fmt]: 1.0
                for fmt in problem.options[writer]
                if result_format(fmt) in (None, kept)
            }
            if len(fitting) < len(problem.options[writer]):
                price = problem.prices.casts[source][kept]
                copy = self._column(("copy", source, kept), price, 0.0, False)
                self._row({copy: 1.0, self.columns["site", store, kept]: -1.0, **fitting}, 0.0)

    def _copies_of_exact_sources(self) -> None:
        """A tensor that shows other tensors' bits is rounded if one of them has more of them."""
        problem = self.problem
        for store in problem.statistics.exact:
            for fmt in problem.options.get(store, ()):
                noise = problem.store_variance(store, fmt)
                for source in problem.exact_sources(store) if noise > 0 else ():
                    exact = self._exact(source, fmt)
                    if exact is not None:
                        rounding = self._column(("round", store, "", fmt), 0.0, noise, False)
                        own = self.columns["site", store, fmt]
                        self._row({rounding: 1.0, own: -1.0, **dict.fromkeys(exact, 1.0)}, 0.0)

    def _pairs(self) -> None:
        """Both arguments rounded to one format: at least r + r' - 1, at most either of them."""
        problem = self.problem
        for first, second, pair in problem.pairs:
            for fmt in CHOICES:
                keys = [_rounding(first, fmt), _rounding(second, fmt)]
                if not all(key in self.columns for key in keys):
                    continue
                one, other = (self.columns[key] for key in keys)
                noise = problem.pair_variance(first, second, pair, fmt)
                both = self._column(("pair", *keys[0], *keys[1]), 0.0, noise, False)
                self.relieved[both] = 2.0  # two roundings of the same size
                if noise > 0:
                    self._row({both: 1.0, one: -1.0, other: -1.0}, -1.0)
                    continue
                for link, column in ((first, one), (second, other)):
                    self._row({both: -1.0, column: 1.0}, 0.0)
                    self._only_where_rounded(link, fmt, column)

    def _only_where_rounded(self, link: Link, fmt: str, column: int) -> None:
        """A rounding that makes another's effect smaller must be one that takes place."""
        self.relieved[column] = 1.0
        own = self.columns["site", link.contraction, fmt]
        self._row({column: -1.0, own: 1.0}, 0.0)
        for stored in self._exact(link.store, fmt) or ():
            self._row({column: -1.0, stored: -1.0}, -1.0)

    def _reads(self) -> None:
        problem = self.problem
        for link in problem.links.reads:
            for fmt in problem.options[link.contraction]:
                own = self.columns["site", link.contraction, fmt]
                entry = entry_format(argument_format(link, fmt))
                stored = self._stored(link.store, partial(eq, entry))
                if stored is not None:
                    price = problem.prices.casts[link.source][entry]
                    copy = self._column(("copy", link.source, entry), price, 0.0, False)
                    self._row({copy: 1.0, own: -1.0, **dict.fromkeys(stored, 1.0)}, 0.0)
                exact = self._exact(link.store, fmt)
                noise = problem.link_variance(link, fmt)
                if exact is not None and noise > 0:
                    rounding = self._column(_rounding(link, fmt), 0.0, noise, False)
                    self._row({rounding: 1.0, own: -1.0, **dict.fromkeys(exact, 1.0)}, 0.0)

    def _exact(self, store: str | None, fmt: str) -> Sequence[int] | None:
        """Storage formats from which a reading rounds nothing; None if that is all of them."""
        return self._stored(store, lambda kept: not self.problem.rounds_again(kept, fmt))

    def _stored(self, store: str | None, wanted: Callable[[str], bool]) -> Sequence[int] | None:
        """Columns of the storage formats that satisfy ``wanted``; None if all possible ones do."""
        if store is None:
            return None if wanted("fp32") else []
        formats = self.problem.options[store]
        if all(wanted(fmt) for fmt in formats):
            return None
        return [self.columns["site", store, fmt] for fmt in formats if wanted(fmt)]


def _rounding(link: Link, fmt: str) -> tuple[str, ...]:
    return "round", link.contraction, str(link.argument), fmt
