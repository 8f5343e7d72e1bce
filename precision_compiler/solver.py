"""The fastest assignment within an error budget: by parts if there are many, or in one program."""

import time
from math import isfinite

from precision_compiler.composed import Composed
from precision_compiler.problem import Problem, Solution, judged
from precision_compiler.program import Program
from precision_compiler.reach import unreachable

FEW = 250
"""Sites up to which one program for the whole problem is solved in less than a second."""

MANY = 1000
"""Sites up to which it closes a gap sooner than branching on a part does."""


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
    fixed = problem.prices.fixed
    return _solved(problem.without_fixed_time(), budget, gap, seconds).later(fixed)


def _solved(problem: Problem, budget: float, gap: float, seconds: float) -> Solution:
    end = time.monotonic() + seconds
    found = None
    if len(problem.options) > FEW and not isfinite(problem.most_bytes):  # which ties all parts
        composed = Composed(problem)
        if len(problem.options) > MANY:
            found = composed.solve(budget**2, gap, end)
        else:
            found = composed.solve(budget**2, gap, end, branches=0)
        if found is not None and found.gap <= gap:
            return found
    whole = solve_whole(problem, budget**2, gap, max(1.0, end - time.monotonic()))
    best = _better(problem, found, whole)
    if best is not None:
        return best
    exact = problem.uniform()
    if any(problem.violations(exact)) or problem.error(exact) > budget:
        raise unreachable(problem, budget)
    return judged(problem, exact, 0.0)  # the time was too short to find or prove anything


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


def _better(problem: Problem, one: Solution | None, other: Solution | None) -> Solution | None:
    if one is None or other is None:
        return one or other
    fastest = min(one, other, key=lambda solution: solution.seconds)
    return judged(problem, dict(fastest.assignment), max(one.bound, other.bound))
