"""Up to ten sites of up to four formats: the solver against every assignment there is."""

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from precision_compiler.composed import Composed
from precision_compiler.errors import BudgetError
from precision_compiler.problem import Problem
from precision_compiler.solver import solve
from tests.brute_force import every_assignment
from tests.random_problems import legal_assignments, problems

GAP = 1e-6
TEN_SITES = problems(most_stores=5, most_contractions=5, most_options=4)


@settings(max_examples=80, deadline=None)
@given(problems())
def test_arrays_say_what_the_problem_says(problem: Problem) -> None:
    table = every_assignment(problem)
    legal = list(legal_assignments(problem))
    assert table.legal.sum() == len(legal)
    seconds = sorted(problem.seconds(each) for each in legal)
    assert np.allclose(sorted(table.seconds[table.legal]), seconds, rtol=1e-9)
    variances = sorted(problem.variance(each) for each in legal)
    assert np.allclose(sorted(table.variance[table.legal]), variances, rtol=1e-9, atol=1e-15)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(TEN_SITES, st.floats(0.05, 0.95))
def test_ten_sites_are_solved_as_every_assignment_listed(problem: Problem, share: float) -> None:
    table = every_assignment(problem)
    assume(table.legal.any())
    # A budget half way between two reachable variances, so that no rounding decides.
    reachable = np.unique(table.variance[table.legal])
    place = min(int(share * len(reachable)), len(reachable) - 1)
    upper = reachable[min(place + 1, len(reachable) - 1)]
    limit = (reachable[place] + upper) / 2
    assume(
        limit > 1e-9 and (upper - reachable[place] > 1e-5 * upper or place == len(reachable) - 1)
    )
    limit *= 1 + 1e-5 * (place == len(reachable) - 1)
    best = table.fastest(limit)
    try:
        found = solve(problem, limit**0.5, GAP)
    except BudgetError:
        assert best == np.inf
        return
    assert found.seconds == pytest.approx(best, rel=1e-5, abs=1e-11)
    assert found.bound <= best * (1 + 1e-6) + 1e-12
    composed = Composed(problem.without_fixed_time()).solve(limit, GAP)
    assert composed is None or composed.bound <= best * (1 + 1e-6) + 1e-12
