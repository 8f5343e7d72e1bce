"""The whole trade-off of time against error of one problem, point by point."""

import time
from collections.abc import Callable, Iterable

import numpy as np

from precision_compiler.composed import Composed
from precision_compiler.problem import Problem, Solution
from precision_compiler.solver import FEW, solve_whole

_LADDER = (0.1, 1.0, 10.0, 1e2, 1e3, 1e4)  # rates that are tried first, of the average one


def frontier(
    problem: Problem,
    points: int = 20,
    gap: float = 1e-3,
    seconds: float = 300.0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
    through: Iterable[float] = (),
) -> tuple[Solution, ...]:
    """Fastest assignments for budgets from none to all that helps, in the order of their errors.

    1. The largest budget is the error of the fastest assignment, 1 at the most: beyond it the
       gradient is nothing but error.
    2. The others lie on the curve of the relaxed problem, in equal steps along it where both
       axes are logarithmic; the last allows nothing but the least error there is.
    3. Every point is solved as ``solve`` does, and its bound and gap hold for its own error as
       the budget too: what keeps a smaller budget keeps the larger one it was found with.
    4. What solves one point is kept for the next: budgets go down, so that bounds still hold.

    Args:
        problem: options, prices and variances.
        points: budgets to solve for; equal solutions are listed once.
        gap: relative optimality gap to aim at; a point states which one it reached.
        seconds: time limit; the points found by then are returned.
        progress: called with the number of budgets done and of all.
        through: further budgets, as errors, such as those of plans to compare with.

    Returns:
        No point is beaten by another in both time and error.
    """
    end, fixed = time.monotonic() + seconds, problem.prices.fixed
    problem = problem.without_fixed_time()
    composed = Composed(problem)
    fastest = _solved(composed, 1.0, gap, end)
    if fastest is None:
        return ()
    found, largest = [fastest], problem.variance(fastest.assignment)
    wanted = [error**2 for error in through if error**2 < largest]
    curve = _limits(composed, largest, points, end)
    limits = sorted({*curve, *(limit for limit in wanted if limit > curve[-1])}, reverse=True)
    for number, limit in enumerate(limits):
        progress(number, len(limits))
        if time.monotonic() > end:
            break
        solution = _solved(composed, limit, gap, end)
        if solution is not None:
            found.append(solution)
    return tuple(solution.later(fixed) for solution in _unbeaten(found))


def _solved(composed: Composed, limit: float, gap: float, end: float) -> Solution | None:
    found = composed.solve(limit, gap, end)
    if (found is None or found.gap > gap) and len(composed.problem.options) <= FEW:
        whole = solve_whole(composed.problem, limit, gap, max(1.0, end - time.monotonic()))
        return whole or found
    return found


def _limits(composed: Composed, largest: float, points: int, end: float) -> list[float]:
    """Variances in equal steps along the curve of the relaxed problem, descending (rule 2)."""
    steps = composed.corners(largest)
    average = sum(step.seconds for step in steps) / (largest or 1.0)
    for factor in _LADDER if average and largest else ():
        composed.price(factor * average, largest, end)
    least, slowest = composed.start(largest)
    steps = composed.corners(largest)
    variances = least + np.cumsum([0.0, *(step.variance for step in steps)])
    times = slowest - np.cumsum([0.0, *(step.seconds for step in steps)])
    variances, along = variances[1:], np.zeros(max(0, len(steps)))
    for values, most in ((variances, largest), (times[1:], slowest)):
        axis = np.log(np.maximum(values, 1e-12 * most))
        if len(axis) and axis[0] != axis[-1]:
            along += (axis - axis[0]) / (axis[-1] - axis[0])
    lowest = least * (1 + 4e-6)  # exactly the least would be at the edge of the solver's tolerance
    if not len(along):
        return [lowest]
    found = np.interp(np.linspace(along[-1], 0.0, max(1, points - 1)), along, variances)
    return [*(float(limit) for limit in np.clip(found, lowest, max(lowest, largest))), lowest]


def _unbeaten(solutions: list[Solution]) -> tuple[Solution, ...]:
    best: list[Solution] = []
    for solution in sorted(solutions, key=lambda each: (each.error, each.seconds)):
        if not best or solution.seconds < best[-1].seconds:
            best.append(solution)
    return tuple(best)
