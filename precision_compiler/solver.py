"""The fastest assignment within an error budget: by parts if there are many, or in one program.

Formats often take the same time: bf16 and fp16, or all of them where a kernel waits for something
else. The solver returns any of those, so what it found is then made as accurate as it can be in
the time that it takes.
"""

import time
from math import inf, isfinite

from precision_compiler.composed import Composed
from precision_compiler.parts import split
from precision_compiler.problem import Problem, Solution, judged
from precision_compiler.program import Program
from precision_compiler.reach import unreachable

FEW = 250
"""Sites up to which one program for the whole problem is solved in less than a second."""

MANY = 1000
"""Sites up to which it closes a gap sooner than branching on a part does."""

NEARLY = 1e-2
"""Gap of a large problem that is not worth more time to close than it took to get there."""

SAME_TIME = 2e-6
"""Relative difference of two times that counts as none: twice what HiGHS keeps constraints to."""

_POLISH = 2.0  # seconds to look for less error in the same time, for each part


def solve(problem: Problem, budget: float, gap: float = 1e-3, seconds: float = 60.0) -> Solution:
    """Return the fastest legal assignment with predicted error at most ``budget``.

    No other one has less error in the time of each of the problem's parts, to within SAME_TIME.

    Args:
        problem: options, prices and variances.
        budget: largest relative gradient error.
        gap: relative optimality gap to stop at.
        seconds: time limit; the best assignment by then is returned with the gap it has. Of more
            than MANY sites, one with a gap of NEARLY is returned after twice the time it took.

    Raises:
        BudgetError: nothing fits; it says what would, and what stands against it.
    """
    fixed, free, end = (
        problem.prices.fixed,
        problem.without_fixed_time(),
        time.monotonic() + seconds,
    )
    return quieter(free, _solved(free, budget, gap, end), end).later(fixed)


def _solved(problem: Problem, budget: float, gap: float, end: float) -> Solution:
    found, start = None, time.monotonic()
    if len(problem.options) > FEW and not isfinite(problem.most_bytes):  # which ties all parts
        composed = Composed(problem)
        if len(problem.options) > MANY:
            found = composed.solve(budget**2, gap, end)
            if found is not None and found.gap <= NEARLY:
                end = min(end, 2 * time.monotonic() - start)
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


def quieter(problem: Problem, solution: Solution, end: float = inf) -> Solution:
    """The assignment of least error in the time of a solution, part by part.

    Args:
        problem: of the solution.
        solution: kept where nothing is better.
        end: when to stop, on the monotonic clock.
    """
    chosen, known = dict(solution.assignment), dict[object, tuple[str, ...]]()
    for part in [problem] if isfinite(problem.most_bytes) else split(problem):
        own = {name: chosen[name] for name in part.options}
        program = Program(part)
        key = (program.fingerprint, tuple(own.values()))
        if key not in known:
            known[key] = tuple(_quieter_part(part, program, own, end).values())
        chosen |= zip(own, known[key], strict=True)
    found = judged(problem, chosen, solution.bound)
    return found if found.error < solution.error else solution


def _quieter_part(
    part: Problem, program: Program, own: dict[str, str], end: float
) -> dict[str, str]:
    seconds, variance = part.seconds(own), part.variance(own)
    left = min(_POLISH, end - time.monotonic())
    if variance <= 0.0 or left <= 0.0:
        return own
    found = program.quietest(seconds, variance, left)
    if found is None:
        return own
    other = {name: found[0][name] for name in own}
    fits = part.seconds(other) <= seconds * (1 + SAME_TIME) and not any(part.violations(other))
    return other if fits and part.variance(other) < variance else own


def _better(problem: Problem, one: Solution | None, other: Solution | None) -> Solution | None:
    if one is None or other is None:
        return one or other
    fastest = min(one, other, key=lambda solution: solution.seconds)
    return judged(problem, dict(fastest.assignment), max(one.bound, other.bound))
