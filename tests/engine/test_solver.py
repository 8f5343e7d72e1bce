"""Solving part by part: against one program for the whole, and against every assignment."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from precision_compiler.composed import Composed
from precision_compiler.errors import BudgetError
from precision_compiler.parts import split
from precision_compiler.problem import Problem, Solution
from precision_compiler.solver import solve, solve_whole
from tests.passes.assign.test_choose_formats import PARTS, fitting, small_problem, trusted
from tests.random_problems import (
    ROUNDING,
    legal_assignments,
    plain_seconds,
    problems,
    readers,
    side_by_side,
)

GAP = 1e-3
many = settings(
    max_examples=500,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
)
some = settings(many, max_examples=60)


@many
@given(problems(), PARTS)
def test_bound_of_the_parts_is_never_above_the_best_of_all(problem: Problem, part: float) -> None:
    budget = fitting(problem, part)
    best = min(
        plain_seconds(problem, assignment)
        for assignment in legal_assignments(problem)
        if problem.error(assignment) <= budget and trusted(problem, assignment, budget)
    )
    found = Composed(problem).solve(budget**2, GAP)
    assert found is not None
    assert found.bound <= best * (1 + 1e-6) + 1e-12
    assert found.seconds >= best * (1 - 1e-9)
    assert found.error <= budget * (1 + 1e-5)
    assert found.error == problem.error(found.assignment)
    assert found.seconds == pytest.approx(plain_seconds(problem, found.assignment), abs=1e-15)


@settings(many, max_examples=150)
@given(problems(), problems(), PARTS)
def test_two_problems_under_one_budget_against_every_pair_of_assignments(
    one: Problem, other: Problem, part: float
) -> None:
    problem = side_by_side(one, other)
    limit = fitting(one, part) ** 2 + fitting(other, part) ** 2
    tables = [listed(each, limit**0.5) for each in (one, other)]
    seconds, variance = (np.add.outer(*columns) for columns in zip(*tables, strict=True))
    best = float(seconds[variance <= limit].min())
    for found in (solve(problem, limit**0.5, GAP), Composed(problem).solve(limit, GAP)):
        assert found is not None
        assert found.bound <= best * (1 + 1e-6) + 1e-12
        assert found.error**2 <= limit * (1 + 1e-5)
        assert found.seconds <= best + found.gap * found.seconds + 1e-10
    assert solve(problem, limit**0.5, GAP).seconds <= best * (1 + 2 * GAP) + 1e-10


def listed(problem: Problem, budget: float) -> tuple[list[float], list[float]]:
    """Seconds and variance of every assignment that is legal and trusted within a budget."""
    legal = [each for each in legal_assignments(problem) if trusted(problem, each, budget)]
    seconds = [plain_seconds(problem, assignment) for assignment in legal]
    return seconds, [problem.variance(assignment) for assignment in legal]


@settings(many, max_examples=100)
@given(problems())
def test_parts_add_up_to_the_whole(problem: Problem) -> None:
    parts = split(problem)
    assert Counter(name for part in parts for name in part.options) == Counter([*problem.options])
    for assignment in list(legal_assignments(problem))[::17]:
        seconds = sum(part.seconds(assignment) for part in parts)
        variance = sum(part.variance(assignment) for part in parts)
        assert seconds == pytest.approx(problem.seconds(assignment), rel=1e-12, abs=1e-18)
        assert variance == pytest.approx(problem.variance(assignment), rel=1e-9, abs=1e-18)


@some
@given(st.lists(problems(), min_size=2, max_size=4), st.integers(1, 3), PARTS)
def test_composed_is_as_good_as_one_program_up_to_the_gap_it_states(
    parts: list[Problem], copies: int, part: float
) -> None:
    problem = side_by_side(*parts * copies)
    loudest = max(legal_assignments(parts[0]), key=parts[0].error)
    limit = (part * parts[0].error(loudest)) ** 2 * copies
    whole, composed = solve_whole(problem, limit, 1e-6, 20.0), Composed(problem).solve(limit, GAP)
    assert whole is not None
    assert composed is not None
    assert composed.bound <= whole.seconds * (1 + 1e-6) + 1e-12
    assert whole.bound <= composed.seconds * (1 + 1e-6) + 1e-12
    assert composed.seconds * (1 - composed.gap) == pytest.approx(composed.bound, abs=1e-15)
    assert composed.error**2 <= limit * (1 + 1e-5)


@pytest.mark.parametrize("allowed", [0, 1, 3, 5, 6])
def test_equal_layers_need_not_get_equal_formats(allowed: int) -> None:
    problem = side_by_side(*[readers(1.0)] * 6)
    composed = Composed(problem)
    assert len(composed.curves) == 1
    found = composed.solve((allowed + 0.5) * ROUNDING**2, GAP)
    assert found is not None
    assert list(found.assignment.values()).count("bf16") == allowed


def test_layers_of_other_errors_are_solved_on_their_own() -> None:
    problem = side_by_side(readers(1.0), readers(2.0), readers(1.0))
    assert sorted(len(curve.members) for curve in Composed(problem).curves) == [1, 2]
    found = solve(problem, 1.5 * ROUNDING)
    assert found.assignment == {"0c0": "bf16", "1c0": "fp32", "2c0": "bf16"}


def random_layers(count: int, seed: int) -> Problem:
    """Layers of four readers of one tensor each, every one with errors and prices of its own."""
    rng = np.random.default_rng(seed)
    layers = []
    for _ in range(count):
        layer = readers(*np.exp(rng.normal(size=4)))
        prices = {
            name: {"fp32": float(9e-6 * rng.uniform(0.5, 2)), "bf16": 1e-6}
            for name in layer.options
        }
        layers.append(replace(layer, prices=replace(layer.prices, contractions=prices)))
    return side_by_side(*layers)


@pytest.mark.parametrize("part", [0.1, 0.3, 0.6])
def test_many_parts_reach_a_small_gap_without_the_whole_program(part: float) -> None:
    problem = random_layers(80, 0)
    budget = part * problem.error(problem.uniform("bf16"))
    found = Composed(problem).solve(budget**2, GAP)
    assert found is not None
    assert found.gap <= GAP
    assert found.error <= budget * (1 + 1e-6)


def test_limits_may_become_smaller_one_after_the_other() -> None:
    problem = side_by_side(*[readers(1.0, -0.9), readers(1.0, 0.5), readers(0.3)] * 3)
    composed, largest = Composed(problem), problem.variance(problem.uniform("bf16"))
    for part in (1.0, 0.5, 0.2, 0.05, 0.01, 0.0):
        again, anew = (
            composed.solve(part * largest, GAP),
            Composed(problem).solve(part * largest, GAP),
        )
        assert again is not None
        assert anew is not None
        assert again.seconds == pytest.approx(anew.seconds, rel=2 * GAP)
        assert again.bound <= anew.seconds * (1 + 1e-9)


def vetoed(problem: Problem, **options: tuple[str, ...]) -> Problem:
    return replace(problem, options={**problem.options, **options})


def test_impossible_budget_names_the_nearest_and_what_stands_against_it() -> None:
    problem = vetoed(side_by_side(readers(1.0), readers(3.0)), **{"1c0": ("bf16",)})
    with pytest.raises(BudgetError) as caught:
        solve(problem, ROUNDING)
    message = str(caught.value)
    assert f"{3.0 * ROUNDING:.3g}" in message
    assert "1c0 (only bf16 allowed)" in message
    assert "0c0" not in message
    assert solve(problem, 3.0001 * ROUNDING).assignment == {"0c0": "fp32", "1c0": "bf16"}


def test_contradicting_vetoes_are_named() -> None:
    with pytest.raises(BudgetError, match=r"contradict each other at c \(bf16\), s \(fp32\)"):
        solve(vetoed(small_problem(), c=("bf16",), s=("fp32",)), 1.0)


def test_float32_is_the_answer_where_there_was_no_time_for_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("precision_compiler.solver.solve_whole", lambda *_: None)
    found = solve(readers(1.0), 1.0)
    assert found.assignment == {"c0": "fp32"}
    assert found.bound == 0.0
    assert found.gap == 1.0


@settings(many, max_examples=150)
@given(problems(), problems(), PARTS)
def test_no_assignment_of_a_part_errs_less_in_the_same_time(
    one: Problem, other: Problem, part: float
) -> None:
    problem = side_by_side(one, other)
    limit = fitting(one, part) ** 2 + fitting(other, part) ** 2
    chosen = solve(problem, limit**0.5, GAP).assignment
    for each in split(problem):
        own = {name: chosen[name] for name in each.options}
        seconds = plain_seconds(each, own)
        least = min(
            each.variance(known)
            for known in legal_assignments(each)
            if plain_seconds(each, known) <= seconds * (1 + 1e-9)
            and trusted(each, known, max(0.0, each.variance(own)) ** 0.5)
        )
        assert each.variance(own) <= max(0.0, least) * (1 + 1e-5) + 2e-6 * limit


def test_of_formats_that_take_the_same_time_the_more_accurate_one_is_taken() -> None:
    problem = readers(1.0)
    flat = {
        name: dict.fromkeys(prices, 1e-6) for name, prices in problem.prices.contractions.items()
    }
    free = {name: dict.fromkeys(prices, 0.0) for name, prices in problem.prices.casts.items()}
    even = replace(problem, prices=replace(problem.prices, contractions=flat, casts=free))
    found = solve(even, 1.0, GAP)
    assert found.error == 0.0
    assert found.seconds == plain_seconds(even, found.assignment)


@pytest.mark.parametrize(("short_of", "most"), [(5e-3, 1.0), (5e-2, 60.0)])
def test_a_large_problem_that_is_nearly_proven_takes_no_longer_than_it_took_so_far(
    monkeypatch: pytest.MonkeyPatch, short_of: float, most: float
) -> None:
    given, problem = list[float](), small_problem()
    budget = fitting(problem, 0.5)
    exact = solve_whole(problem, budget**2, 0.0, 10.0)
    assert exact is not None

    def short(_self: Composed, *_args: object) -> Solution:
        return replace(exact, bound=exact.seconds * (1 - short_of), gap=short_of)

    def whole(_problem: Problem, _limit: float, _gap: float, seconds: float) -> Solution:
        given.append(seconds)
        return exact

    monkeypatch.setattr("precision_compiler.solver.FEW", 0)
    monkeypatch.setattr("precision_compiler.solver.MANY", 0)
    monkeypatch.setattr(Composed, "solve", short)
    monkeypatch.setattr("precision_compiler.solver.solve_whole", whole)
    assert solve(problem, budget, GAP, 60.0).gap <= GAP
    assert given[0] == pytest.approx(most, abs=0.9)
