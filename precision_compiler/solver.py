"""The fastest assignment within an error budget, and a proof of how far from it we may be.

What is proven. Let the parts of a problem touch nowhere but in the budget: ``T(x) = sum T_c(x_c)``
is the time, ``V(x) = sum V_c(x_c)`` the variance, and V may be at most B. For every rate r >= 0 and
every x within the budget

    T(x) >= T(x) + r (V(x) - B) = sum_c (T_c + r V_c)(x_c) - r B >= sum_c L_c(r) - r B,

where L_c(r) is a proven lower bound of the least ``T_c + r V_c`` over all assignments of part c,
not only over those that are known (HiGHS proves it; between two rates it follows by concavity).
So the right-hand side bounds the original problem at any r, whichever points were found; the best
r comes from the linear relaxation over the points known. An assignment is then composed of known
points by an integer program with one row; it need not be optimal for the bound to hold. Where it
leaves a gap, each part is asked for the fastest assignment that what is left of the budget allows.
"""

import time
from collections.abc import Sequence
from itertools import pairwise
from math import inf, isfinite

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from precision_compiler.errors import InternalError
from precision_compiler.parts import split
from precision_compiler.problem import Problem, Solution
from precision_compiler.program import TOLERANCE, Program
from precision_compiler.reach import unreachable
from precision_compiler.tradeoff import Point, Tradeoff, pareto

FEW = 250
"""Sites up to which one program for the whole problem is solved in less than a second."""

_ROUNDS = 40  # of finding a rate and solving the parts at it
_REFINEMENTS = 6  # of the points, where those on the hulls leave a gap


def solve(problem: Problem, budget: float, gap: float = 1e-3, seconds: float = 60.0) -> Solution:
    """Return the fastest legal assignment with predicted error at most ``budget``.

    Args:
        problem: options, prices and variances.
        budget: largest relative gradient error.
        gap: relative optimality gap to stop at.
        seconds: time limit; the best assignment by then is returned with the gap it has.

    Raises:
        BudgetError: nothing fits; it says what would, and what stands against it.
    """
    end = time.monotonic() + seconds
    found = None
    if len(problem.options) > FEW:
        found = Composed(problem).solve(budget**2, gap, end)
        if found is not None and found.gap <= gap:
            return found
    whole = solve_whole(problem, budget**2, gap, max(1.0, end - time.monotonic()))
    best = _better(problem, found, whole)
    if best is None:
        raise unreachable(problem, budget)
    return best


def solve_whole(problem: Problem, limit: float, gap: float, seconds: float) -> Solution | None:
    """The same by one program for the whole problem; None if it finds nothing.

    Args:
        problem: options, prices and variances.
        limit: largest variance.
        gap: relative optimality gap to stop at.
        seconds: time limit.
    """
    found = Program(problem).minimise(limit, gap, seconds)
    return None if found is None else judged(problem, *found)


def judged(problem: Problem, assignment: dict[str, str], bound: float) -> Solution:
    """An assignment with its exact time and error."""
    broken = next(problem.violations(assignment), None)
    if broken:
        raise InternalError(f"the solver returned an illegal assignment: {broken}")
    exact = problem.seconds(assignment)
    bound = min(bound, exact)
    gap = (exact - bound) / exact if exact else 0.0
    return Solution(assignment, exact, problem.error(assignment), bound, gap)


def _better(problem: Problem, one: Solution | None, other: Solution | None) -> Solution | None:
    if one is None or other is None:
        return one or other
    fastest = min(one, other, key=lambda solution: solution.seconds)
    return judged(problem, dict(fastest.assignment), max(one.bound, other.bound))


class Composed:
    """A problem solved part by part; limits may only become smaller from call to call.

    Parts that are equal but for their names are solved once. They are not tied together: the
    integer program says how many of them take which point.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        found: dict[object, Tradeoff] = {}
        for part in split(problem):
            program = Program(part)
            key, names = program.fingerprint, tuple(part.options)
            if key in found:
                found[key].members.append(names)
            else:
                found[key] = Tradeoff(part, program, [names])
        self.curves = list(found.values())

    def solve(self, limit: float, gap: float, end: float = inf) -> Solution | None:
        """The best assignment composed of known points; None if there is none.

        Args:
            limit: largest variance.
            gap: relative gap to aim at: the solution says which one was reached.
            end: when to stop, on the monotonic clock.
        """
        for curve in self.curves:
            curve.narrow(limit)
        bound = self._bound(limit, gap, end)
        best = self._composed(limit, bound, gap, end)
        for _ in range(_REFINEMENTS):
            if best is None or best.gap <= gap or not isfinite(limit) or time.monotonic() > end:
                break
            self._refine(best, limit, end)
            found = self._composed(limit, bound, gap, end)
            if found is None or found.seconds >= best.seconds:
                break
            best = found
        return best

    def price(self, rate: float, limit: float, end: float = inf) -> float:
        """Lower bound of the sum over all parts of ``seconds + rate * variance``.

        Args:
            rate: seconds that a unit of variance costs.
            limit: largest variance in total.
            end: when to stop, on the monotonic clock.
        """
        return sum(
            len(curve.members) * curve.ask(rate, limit, max(0.1, end - time.monotonic()))
            for curve in self.curves
        )

    def corners(self, limit: float) -> list[tuple[float, float, float]]:
        """Steps along the hulls of all parts: (seconds per variance, variance, seconds saved)."""
        steps = []
        for curve in self.curves:
            hull, times = list(curve.hull(limit)), len(curve.members)
            for slow, fast in pairwise(hull):
                more, saved = fast.variance - slow.variance, slow.seconds - fast.seconds
                steps.append((saved / more, times * more, times * saved))
        return sorted(steps, reverse=True)

    def start(self, limit: float) -> tuple[float, float]:
        """Variance and seconds with every part at its least variance; infinite if one has none."""
        hulls = [next(curve.hull(limit), None) for curve in self.curves]
        if None in hulls:
            return inf, inf
        pairs = [(len(c.members), p) for c, p in zip(self.curves, hulls, strict=True) if p]
        return sum(n * p.variance for n, p in pairs), sum(n * p.seconds for n, p in pairs)

    def _bound(self, limit: float, gap: float, end: float) -> float | None:
        """The largest ``sum_c L_c(r) - r B`` found; None if the points known fit nowhere."""
        best = -inf
        for _ in range(_ROUNDS):
            relaxed = self._relaxed(limit)
            if relaxed is None:
                return None
            rate, reached = relaxed
            spent = rate * limit if rate else 0.0  # no rate, no limit: not infinity times 0
            best = max(best, self.price(rate, limit, end) - spent)
            if reached - best <= 0.05 * gap * abs(reached) or time.monotonic() > end:
                break
        return best

    def _relaxed(self, limit: float) -> tuple[float, float] | None:
        """The linear relaxation over known points: what variance is worth, and the time."""
        variance, seconds = self.start(limit)
        if variance > limit * (1 + 1e-9):
            return None
        for rate, more, saved in self.corners(limit):
            if variance + more > limit:
                return rate, seconds - rate * (limit - variance)
            variance, seconds = variance + more, seconds - saved
        return 0.0, seconds

    def _composed(
        self, limit: float, bound: float | None, gap: float, end: float
    ) -> Solution | None:
        chosen = None if bound is None else self._compose(limit, gap, end)
        return None if chosen is None or bound is None else judged(self.problem, chosen, bound)

    def _refine(self, solution: Solution, limit: float, end: float) -> None:
        """Ask every part for the fastest assignment that spends what is left of the budget."""
        left = limit - self.problem.variance(solution.assignment)
        for curve in self.curves:
            used = {tuple(solution.assignment[name] for name in names) for names in curve.members}
            for formats in used if time.monotonic() < end else ():
                curve.improve(formats, left, end - time.monotonic())

    def _compose(self, limit: float, gap: float, end: float) -> dict[str, str] | None:
        """How many equal parts take which point: an integer program with one budget row."""
        choices = [(curve, pareto(curve.within(limit))) for curve in self.curves]
        if not all(points for _, points in choices):
            return None
        points = [point for _, found in choices for point in found]
        owners = [index for index, (_, found) in enumerate(choices) for _ in found]
        counts = [float(len(curve.members)) for curve, _ in choices]
        every = csr_array((np.ones(len(points)), (owners, range(len(points)))))
        constraints = [LinearConstraint(every, counts, counts)]
        if isfinite(limit) and limit > 0:
            shares = np.array([point.variance for point in points]) / limit
            constraints.append(LinearConstraint(shares, -np.inf, 1.0 - TOLERANCE))
        costs = np.array([point.seconds for point in points])
        result = milp(
            costs / (costs.max() or 1.0),
            integrality=np.ones(len(points), dtype=int),
            bounds=Bounds(0, np.array(counts)[owners]),
            constraints=constraints,
            options={"mip_rel_gap": 0.1 * gap, "time_limit": max(0.5, end - time.monotonic())},
        )
        if result.x is None:
            return None
        return _dealt(choices, [round(number) for number in result.x])


def _dealt(
    choices: Sequence[tuple[Tradeoff, Sequence[Point]]], numbers: Sequence[int]
) -> dict[str, str]:
    """Give each of equal parts one of the points that were chosen for them."""
    found: dict[str, str] = {}
    left = iter(numbers)
    for curve, points in choices:
        taken = [point for point in points for _ in range(next(left))]
        for names, point in zip(curve.members, taken, strict=True):
            found |= zip(names, point.formats, strict=True)
    return found
