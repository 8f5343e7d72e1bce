"""What to say when nothing fits a budget: the nearest that would, and what stands against it."""

from collections.abc import Iterator
from math import isfinite

from precision_compiler.errors import BudgetError
from precision_compiler.formats import CHOICES
from precision_compiler.parts import split
from precision_compiler.problem import Problem, fixes_result
from precision_compiler.program import Program
from precision_compiler.sizes import readable_bytes

_NAMED = 3  # sites that a message names


def unreachable(problem: Problem, budget: float) -> BudgetError:
    """The error for a budget that no assignment keeps.

    1. Where vetoes contradict each other, no budget helps: the sites are named.
    2. Otherwise the smallest predicted error that can be reached, and the sites that cause it.
    """
    if isfinite(problem.most_bytes):
        return _unstorable(problem, budget)
    quietest: dict[str, str] = {}
    for part in split(problem):
        found = Program(part).quietest()
        if found is None:
            sites = _some(list(_contradictions(part)) or list(part.options))
            return BudgetError(
                f"no assignment keeps the predicted gradient error within {budget:g}, nor any: "
                f"the formats ruled out contradict each other at {sites}"
            )
        quietest |= found[0]
    shares = {name: found for name, found in problem.variances(quietest).items() if found > 0}
    largest = sorted(shares, key=lambda name: -shares[name])
    causes = [f"{name} ({_ruled_out(problem, name)})" for name in largest]
    return BudgetError(
        f"no assignment keeps the predicted gradient error within {budget:g}: the smallest that "
        f"can be reached is {problem.error(quietest):.3g}, because of {_some(causes)}; allow that "
        "much, or lift what rules their wider formats out"
    )


def _unstorable(problem: Problem, budget: float) -> BudgetError:
    """The error where memory is limited: the least that can be kept, whatever the error."""
    narrowest = {
        store: min(problem.options[store], key=lambda fmt: CHOICES[fmt].bytes)
        for store in problem.saved.elements
    }
    least = readable_bytes(problem.stored_bytes(narrowest))
    return BudgetError(
        f"no assignment keeps at most {readable_bytes(problem.most_bytes)} for the backward pass "
        f"and the predicted gradient error within {budget:g}: with every kept tensor in its "
        f"narrowest format it is {least}; allow more memory or more error"
    )


def _ruled_out(problem: Problem, name: str) -> str:
    allowed = problem.options[name]
    if "fp32" not in allowed:
        return f"only {' or '.join(allowed)} allowed"
    return "held by its neighbours"


def _contradictions(part: Problem) -> Iterator[str]:
    """Results that cannot be kept in any format that their contraction returns."""
    for store, writer in part.links.writer.items():
        free = any(not fixes_result(name) or name == "fp32" for name in part.options[writer])
        if not free and not set(part.options[writer]) & set(part.options[store]):
            yield f"{writer} ({' or '.join(part.options[writer]) or 'no format'})"
            yield f"{store} ({' or '.join(part.options[store]) or 'no format'})"


def _some(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
