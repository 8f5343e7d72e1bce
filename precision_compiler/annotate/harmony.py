"""One narrow format instead of two, where that costs nothing: fewer casts in a file."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from precision_compiler.annotate.onnx_file import NARROW
from precision_compiler.compiler import Decision
from precision_compiler.problem import Problem, judged


def in_one_format(decision: Decision) -> Decision:
    """The decision with every site in the commoner narrow format that may have it.

    The time model often gives fp16 and bf16 the same price, and the solver then takes either. In
    a file every change between the two is a cast. Only where the error stays within the budget
    and the time does not grow.
    """
    unit = decision.unit
    solution = unit.solution
    assert solution is not None
    problem, counts = unit.problem, Counter(unit.assignment.values())
    for fmt in sorted(NARROW, key=lambda name: -counts[name]):
        moved = _moved(problem, unit.assignment, fmt)
        fits = not any(problem.violations(moved)) and problem.error(moved) <= unit.budget.limit
        if fits and problem.seconds(moved) <= solution.seconds * (1 + 1e-6):
            unit.solution = judged(problem, moved, solution.bound)
            unit.assignment = dict(moved)
            return replace(decision, unit=unit)
    return decision


def _moved(problem: Problem, assignment: Mapping[str, str], fmt: str) -> dict[str, str]:
    """Sites of the other narrow formats moved to one, results with their contractions."""
    moved = {
        site: fmt if chosen in NARROW and fmt in problem.options[site] else chosen
        for site, chosen in assignment.items()
    }
    for name, stores in problem.links.results.items():
        if moved[name] in NARROW and any(moved[store] != moved[name] for store in stores):
            group = (name, *stores)
            moved.update({site: assignment[site] for site in group})
    return moved
