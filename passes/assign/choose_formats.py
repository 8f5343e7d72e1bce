"""See ChooseFormats."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from precision_compiler.errors import BudgetError, InternalError
from precision_compiler.formats import FORMATS
from precision_compiler.links import Link
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import (
    Problem,
    Solution,
    argument_format,
    entry_format,
    fixes_result,
    result_format,
)

_RELIEF = 100.0  # a rounding of more times the limit would need errors that cancel to 99 %
_TOLERANCE = 1e-6  # the solver keeps constraints to 1e-7: inside the budget, not on its edge


@dataclass(frozen=True)
class ChooseFormats:
    """Find the fastest assignment whose predicted gradient error is within the budget.

    A mixed-integer program, solved by HiGHS to a proven gap:

    1. One binary per (site, format); every site has exactly one format.
    2. One copy variable per (tensor, format): at 1 where any contraction reads the tensor in a
       format it is not stored in, or where a result is stored in another format than it comes
       in; its price is paid once, however many read it.
    3. One rounding variable per (argument, format): at 1 where the stored tensor has more
       significant bits than the contraction's format; its variance counts then. The same for a
       stored tensor that is an exact function of other stored ones: it is rounded only where it
       is kept in fewer bits than one of them.
    4. One variable per pair of arguments that read the same rounded copy and whose effects go
       together: at 1 where both are rounded to the same format; it carries their covariance.
    5. Contractions that return their own format fix the format of their results.
    6. The sum of relative error variances is at most ``budget^2``.

    Variables of 2 to 4 need no integrality: given binary sites they sit at 0 or 1.
    """

    gap: float = 1e-3
    seconds: float = 60.0
    name: ClassVar[str] = "choose-formats"
    reads: ClassVar[frozenset[str]] = frozenset(
        {"statistics", "vetoes", "contraction prices", "traffic prices", "budget"}
    )
    makes: ClassVar[frozenset[str]] = frozenset({"assignment"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.solution`` and ``unit.assignment``."""
        unit.solution = solve(unit.problem, unit.budget.limit, self.gap, self.seconds)
        unit.assignment = dict(unit.solution.assignment)
        return False


def solve(problem: Problem, budget: float, gap: float = 1e-3, seconds: float = 60.0) -> Solution:
    """Return the fastest legal assignment with predicted error at most ``budget``.

    Args:
        problem: options, prices and variances.
        budget: largest relative gradient error.
        gap: relative optimality gap to stop at.
        seconds: time limit; the best assignment by then is returned with the gap it has.

    Raises:
        BudgetError: the budget is not positive where float32 is vetoed, so nothing fits.
    """
    program = _Program(problem)
    found = program.minimise(budget**2, gap, seconds)
    if found is None:
        raise BudgetError(f"no assignment keeps the predicted gradient error within {budget:g}")
    assignment, bound = found
    exact = problem.seconds(assignment)
    broken = next(problem.violations(assignment), None)
    if broken:
        raise InternalError(f"the solver returned an illegal assignment: {broken}")
    bound = min(bound + problem.prices.fixed, exact)
    return Solution(
        assignment,
        exact,
        problem.error(assignment),
        bound,
        (exact - bound) / exact if exact else 0.0,
    )


class _Program:
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

    def minimise(
        self, limit: float, gap: float, seconds: float
    ) -> tuple[dict[str, str], float] | None:
        """Solve; return the assignment and the proven bound, or None if nothing fits."""
        scale = max(self.costs) or 1.0  # HiGHS works with absolute tolerances: keep numbers near 1
        noise = np.array(self.noise)
        constraints = [LinearConstraint(self._matrix(), self.lowest, self.highest)]
        # What alone breaks the budget is barred exactly: beside it the tolerance would hide others.
        barred = noise > limit * (1 + 1e-9)
        relieved = list(self.relieved)  # beside others they may be more than the limit
        most = _RELIEF * limit * np.array(list(self.relieved.values()))
        barred[relieved] = noise[relieved] > most
        if isfinite(limit) and limit > 0:
            shares = np.where(barred, 0.0, noise) / limit
            constraints.append(LinearConstraint(shares, -np.inf, 1.0 - _TOLERANCE))
        result = milp(
            np.array(self.costs) / scale,
            integrality=np.array(self.binary),
            bounds=Bounds(0, np.where(barred, 0.0, 1.0)),
            constraints=constraints,
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

    def _matrix(self) -> csr_array:
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
                    exact = self._stored(
                        source, lambda kept, fmt=fmt: not problem.rounds_again(kept, fmt)
                    )
                    if exact is not None:
                        rounding = self._column(("round", store, "", fmt), 0.0, noise, False)
                        own = self.columns["site", store, fmt]
                        self._row({rounding: 1.0, own: -1.0, **dict.fromkeys(exact, 1.0)}, 0.0)

    def _pairs(self) -> None:
        """Both arguments rounded to one format: at least r + r' - 1, at most either of them."""
        problem = self.problem
        for first, second, pair in problem.pairs:
            for fmt in FORMATS:
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
        for stored in self._exact(link, fmt) or ():
            self._row({column: -1.0, stored: -1.0}, -1.0)

    def _reads(self) -> None:
        problem = self.problem
        for link in problem.links.reads:
            for fmt in problem.options[link.contraction]:
                own = self.columns["site", link.contraction, fmt]
                entry = entry_format(argument_format(link, fmt))
                stored = self._stored(link.store, lambda kept, entry=entry: kept == entry)
                if stored is not None:
                    price = problem.prices.casts[link.source][entry]
                    copy = self._column(("copy", link.source, entry), price, 0.0, False)
                    self._row({copy: 1.0, own: -1.0, **dict.fromkeys(stored, 1.0)}, 0.0)
                exact = self._exact(link, fmt)
                noise = problem.link_variance(link, fmt)
                if exact is not None and noise > 0:
                    rounding = self._column(_rounding(link, fmt), 0.0, noise, False)
                    self._row({rounding: 1.0, own: -1.0, **dict.fromkeys(exact, 1.0)}, 0.0)

    def _exact(self, link: Link, fmt: str) -> Sequence[int] | None:
        """Storage formats from which a reading rounds nothing; None if that is all of them."""
        return self._stored(link.store, lambda kept: not self.problem.rounds_again(kept, fmt))

    def _stored(self, store: str | None, wanted: object) -> Sequence[int] | None:
        """Columns of the storage formats that satisfy ``wanted``; None if all possible ones do."""
        assert callable(wanted)
        if store is None:
            return None if wanted("fp32") else []
        formats = self.problem.options[store]
        if all(wanted(fmt) for fmt in formats):
            return None
        return [self.columns["site", store, fmt] for fmt in formats if wanted(fmt)]


def _rounding(link: Link, fmt: str) -> tuple[str, ...]:
    return "round", link.contraction, str(link.argument), fmt
