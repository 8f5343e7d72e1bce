"""See UnifyFormats."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from precision_compiler.errors import InternalError
from precision_compiler.formats import CHOICES
from precision_compiler.origin import constant_copies, origin_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import Problem, fixes_result, judged


@dataclass(frozen=True)
class UnifyFormats:
    """Keep to one narrow format in an ONNX file, where that costs neither time nor the budget.

    A runtime executes a file node by node, and every change of format between two nodes is a
    cast, which the decision problem does not know between pointwise operations. Graphs that did
    not come from a file stay as they are.

    1. Where the time model gives two plain narrow formats the same price, the solver takes
       either: all such sites move to the one that most sites have, results with contractions.
    2. Constants cost nothing to round beforehand, too little for the solver to see: those with
       the smallest errors join that format as far as the budget reaches.
    """

    name: ClassVar[str] = "unify-formats"
    reads: ClassVar[frozenset[str]] = frozenset({"assignment", "budget"})
    makes: ClassVar[frozenset[str]] = frozenset({"assignment"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Change ``unit.solution`` and ``unit.assignment``."""
        solution = unit.solution
        if solution is None:
            raise InternalError("unify-formats ran before formats were chosen")
        problem, limit = unit.problem, unit.budget.limit
        graph = unit.joint.module.graph
        copies = constant_copies(graph, unit.joint.parameters)
        constants = [name for name, site in unit.links.stores.items() if site.node in copies]
        counts = Counter(name for name in unit.assignment.values() if _is_plain_narrow(name))
        if not counts or not any(map(origin_of, graph.nodes)):
            return False
        for fmt, _ in counts.most_common():
            moved = _moved(problem, unit.assignment, fmt)
            if not _fits(problem, moved, limit, solution.seconds):
                continue
            moved = _with_constants(problem, moved, constants, fmt, limit)
            unit.solution = judged(problem, moved, solution.bound)
            unit.assignment = dict(moved)
            break
        return False


def _is_plain_narrow(name: str) -> bool:
    return fixes_result(name) and CHOICES[name].bits < CHOICES["fp32"].bits


def _moved(problem: Problem, assignment: Mapping[str, str], fmt: str) -> dict[str, str]:
    moved = {
        site: fmt if _is_plain_narrow(chosen) and fmt in problem.options[site] else chosen
        for site, chosen in assignment.items()
    }
    for name, stores in problem.links.results.items():
        group = (name, *stores)
        if len({moved[site] for site in group}) > 1:
            moved.update({site: assignment[site] for site in group})
    return moved


def _fits(problem: Problem, moved: Mapping[str, str], limit: float, seconds: float) -> bool:
    legal = not any(problem.violations(moved)) and problem.error(moved) <= limit
    return legal and problem.seconds(moved) <= seconds * (1 + 1e-6)


def _with_constants(
    problem: Problem, moved: dict[str, str], constants: list[str], fmt: str, limit: float
) -> dict[str, str]:
    open_ones = [
        name for name in constants if moved[name] == "fp32" and fmt in problem.options[name]
    ]
    total = problem.variance(moved)
    for name in sorted(open_ones, key=lambda name: problem.store_variance(name, fmt)):
        total += problem.store_variance(name, fmt)
        if total > limit**2:
            break
        moved[name] = fmt
    return moved
