"""A problem solved part by part, and a proof of how far from the best its solution may be.

What is proven. Let the parts of a problem touch nowhere but in the budget: ``T(x) = sum T_c(x_c)``
is the time, ``V(x) = sum V_c(x_c)`` the variance, and V may be at most B. For every rate r >= 0 and
every x within the budget

    T(x) >= T(x) + r (V(x) - B) = sum_c (T_c + r V_c)(x_c) - r B >= sum_c L_c(r) - r B,

where L_c(r) is a proven lower bound of the least ``T_c + r V_c`` over all assignments of part c,
not only over those that are known (HiGHS proves it; between two rates it follows by concavity).
So the right-hand side bounds the original problem at any r, whichever points were found; the best
r comes from the linear relaxation over the points known. An assignment is then composed of known
points by an integer program with one row; it need not be optimal for the bound to hold.

One large part (the output layer) can leave a gap of its own step. Then its assignments are told
apart by their variance, at most v and at least v: every assignment of the whole is on one of the
two sides, so the smaller of the two sides' bounds holds, and so on within a side. For a part of no
negative variance, ``V_c <= B`` may be asked for in L_c too, as the others are at least 0.
"""

import time
from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from math import inf, isfinite
from typing import NamedTuple

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from precision_compiler.parts import split
from precision_compiler.problem import Problem, Solution, judged
from precision_compiler.program import EDGES, Program
from precision_compiler.tradeoff import Point, Tradeoff, pareto

_ROUNDS = 40  # of finding a rate and solving the parts at it
_REFINED = 16  # kinds of part that are asked for more points, where a gap is left
_BRANCHES = 20  # of a part that is between two corners of its hull


class Step(NamedTuple):
    """From one corner of a part's hull to the next faster one, in all parts of its kind.

    Attributes:
        rate: seconds saved per variance.
        variance: what it adds.
        seconds: what it saves.
        curve: number of the kind.
        middle: variance of one part half way.
    """

    rate: float
    variance: float
    seconds: float
    curve: int
    middle: float


class Composed:
    """A problem solved part by part; limits may only become smaller from call to call.

    Parts that are equal but for their names are solved once. They are not tied together: the
    integer program says how many of them take which point.

    Attributes:
        problem: the whole.
        curves: one per kind of part.
        relief: by how much a part may be beyond the limit, others making up for it: 0 unless
            predicted variances of parts can be negative.
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
        self.relief = -sum(len(curve.members) * curve.least_variance for curve in self.curves)

    def solve(
        self, limit: float, gap: float, end: float = inf, branches: int = _BRANCHES
    ) -> Solution | None:
        """The best assignment composed of known points; None if there is none.

        Args:
            limit: largest variance.
            gap: relative gap to aim at: the solution says which one was reached.
            end: when to stop, on the monotonic clock.
            branches: how often a part may be told apart to close a gap.
        """
        for curve in self.curves:
            curve.narrow(limit)
        bound = self._bound(limit, gap, end)
        best = None if bound is None else self._composed(limit, bound, gap, end)
        if best is None or best.gap <= gap or not isfinite(limit):
            return best
        return self._branched(best, limit, gap, end, branches)

    def price(self, rate: float, limit: float, end: float = inf) -> float:
        """Lower bound of the sum over all parts of ``seconds + rate * variance``.

        Args:
            rate: seconds that a unit of variance costs.
            limit: largest variance in total.
            end: when to stop, on the monotonic clock.
        """
        return sum(
            len(curve.members) * curve.ask(rate, limit, limit + self.relief, _until(end))
            for curve in self.curves
        )

    def corners(self, limit: float) -> list[Step]:
        """Steps along the hulls of all parts, those first that save most for their variance."""
        steps = []
        for number, curve in enumerate(self.curves):
            hull, times = list(curve.hull(limit + self.relief)), len(curve.members)
            for slow, fast in pairwise(hull):
                more, saved = fast.variance - slow.variance, slow.seconds - fast.seconds
                middle = fast.variance - more / 2
                steps.append(Step(saved / more, times * more, times * saved, number, middle))
        return sorted(steps, reverse=True)

    def start(self, limit: float) -> tuple[float, float]:
        """Variance and seconds with every part at its least variance; infinite if one has none."""
        hulls = [next(curve.hull(limit + self.relief), None) for curve in self.curves]
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
            rate, reached, _ = relaxed
            spent = rate * limit if rate else 0.0  # no rate, no limit: not infinity times 0
            best = max(best, self.price(rate, limit, end) - spent)
            if reached - best <= 0.05 * gap * abs(reached) or time.monotonic() > end:
                break
        return best

    def _relaxed(self, limit: float) -> tuple[float, float, Step | None] | None:
        """The linear relaxation over known points: what variance is worth, the time, its break."""
        variance, seconds = self.start(limit)
        if variance > limit * (1 + 1e-9):
            return None
        for step in self.corners(limit):
            if variance + step.variance > limit:
                return step.rate, seconds - step.rate * (limit - variance), step
            variance, seconds = variance + step.variance, seconds - step.seconds
        return 0.0, seconds, None

    def _composed(self, limit: float, bound: float, gap: float, end: float) -> Solution | None:
        chosen = self._compose(limit, gap, end)
        return None if chosen is None else judged(self.problem, chosen, bound)

    def _branched(
        self, best: Solution, limit: float, gap: float, end: float, branches: int
    ) -> Solution:
        """Close the gap that one large part leaves where it is between two corners of its hull.

        Its assignments are told apart by their variance, at most and at least half way, and each
        side gets a bound of its own; the smallest bound of all sides holds for the whole.
        """
        sides = [(best.bound, self)]
        for number in range(branches):
            bound, side = min(sides, key=lambda each: each[0])
            relaxed = side._relaxed(limit)
            if bound >= (1 - gap) * best.seconds or relaxed is None or time.monotonic() > end:
                break
            step = relaxed[2]
            if step is None or len(side.curves[step.curve].members) > 1:
                break
            sides.remove((bound, side))
            for half in side.curves[step.curve].halves(step.middle):
                if half.is_listed and not half.within(inf):
                    continue  # there is no such assignment
                narrower = side._with(step.curve, half)
                found = narrower._bound(limit, gap, end)
                sides.append((bound if found is None else max(bound, found), narrower))
            if number % 3 == 0:
                self._refine(best, limit, end)
            bound = min(low for low, _ in sides)
            anew = self._composed(limit, bound, gap, end) or best
            fastest = min(anew, best, key=lambda each: each.seconds)
            best = judged(self.problem, dict(fastest.assignment), bound)
        return best

    def _with(self, number: int, curve: Tradeoff) -> "Composed":
        other = copy(self)
        other.curves = [*self.curves[:number], curve, *self.curves[number + 1 :]]
        return other

    def _refine(self, solution: Solution, limit: float, end: float) -> None:
        """More points of large parts: what is left of the budget spent, steps taken by half."""
        left = limit - self.problem.variance(solution.assignment)
        relaxed = self._relaxed(limit)
        rate = relaxed[0] if relaxed else 0.0
        near = [step for step in self.corners(limit) if rate / 4 <= step.rate <= 4 * rate]
        near.sort(key=lambda step: -step.seconds)
        for number in list(dict.fromkeys(step.curve for step in near))[:_REFINED]:
            curve = self.curves[number]
            used = {tuple(solution.assignment[name] for name in names) for names in curve.members}
            wanted = {curve.points[formats].variance + left for formats in used}
            half = curve.bisect(rate, limit + self.relief)
            for most in wanted | ({half} if half is not None else set()):
                if time.monotonic() < end:
                    curve.improve(most, end - time.monotonic())

    def _compose(self, limit: float, gap: float, end: float) -> dict[str, str] | None:
        """How many equal parts take which point: an integer program with one budget row."""
        choices = [(curve, pareto(curve.within(limit + self.relief))) for curve in self.curves]
        if not all(points for _, points in choices):
            return None
        points = [point for _, found in choices for point in found]
        owners = [index for index, (_, found) in enumerate(choices) for _ in found]
        counts = [float(len(curve.members)) for curve, _ in choices]
        every = csr_array((np.ones(len(points)), (owners, range(len(points)))))
        constraints = [LinearConstraint(every, counts, counts)]
        variances = np.array([point.variance for point in points])
        costs = np.array([point.seconds for point in points])
        limited = isfinite(limit) and limit > 0
        for most in EDGES if limited else (1.0,):
            budget = [LinearConstraint(variances / limit, -np.inf, most)] if limited else []
            result = milp(
                costs / (costs.max() or 1.0),
                integrality=np.ones(len(points), dtype=int),
                bounds=Bounds(0, np.array(counts)[owners]),
                constraints=[*constraints, *budget],
                options={"mip_rel_gap": 0.1 * gap, "time_limit": _until(end)},
            )
            if result.x is None:
                continue
            numbers = [round(number) for number in result.x]
            if np.dot(variances, numbers) <= limit * (1 + 1e-9):
                return _dealt(choices, numbers)
        return None


def _until(end: float) -> float:
    """Seconds left, for a solver that is called all the same."""
    return max(0.5, end - time.monotonic())


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
