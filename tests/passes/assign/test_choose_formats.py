"""The solver against every assignment there is, on problems small enough to list them."""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from math import inf

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from precision_compiler.errors import BudgetError
from precision_compiler.links import Link, Links
from precision_compiler.passes.assign.choose_formats import ChooseFormats
from precision_compiler.pipeline import Unit
from precision_compiler.problem import Prices, Problem, argument_format, fixes_result
from precision_compiler.solver import solve
from precision_compiler.statistics import Statistics
from tests.helpers import bare_unit
from tests.random_problems import (
    ALL_FORMATS,
    ROUNDING,
    contraction,
    legal_assignments,
    plain_seconds,
    problems,
    readers,
    sensitivity,
    storage,
)

GAP = 1e-3
many = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
)


PARTS = st.sampled_from([0.05, 0.1, 0.2, 0.3, 0.5, 0.8])


@many
@given(problems(), PARTS)
def test_solver_finds_what_listing_every_assignment_finds(problem: Problem, part: float) -> None:
    assert_optimal(problem, fitting(problem, part))


@many
@given(problems(most_stores=0), PARTS)
def test_so_it_does_where_all_readings_are_of_one_tensor(problem: Problem, part: float) -> None:
    assert_optimal(problem, fitting(problem, part))


@settings(many, max_examples=50)
@given(problems(), st.sampled_from([1e-7, 1e-6, 1e-5, 1e-4, 1e-3, inf]))
def test_so_it_does_within_very_small_budgets_and_without_any(
    problem: Problem, budget: float
) -> None:
    assert_optimal(problem, budget)


@settings(many, max_examples=50)
@given(problems())
def test_budget_of_zero_allows_no_rounding_however_well_two_cancel(problem: Problem) -> None:
    assert_optimal(problem, 0.0)


def fitting(problem: Problem, part: float) -> float:
    """A budget that a part of all legal assignments fit."""
    errors = sorted(map(problem.error, legal_assignments(problem)))
    return errors[int(part * len(errors))] * 1.0001


def trusted(problem: Problem, assignment: Mapping[str, str], budget: float) -> bool:
    """Whether no rounding is a hundred times the budget's variance, only made up for by others."""
    return all(
        problem.link_variance(link, assignment[link.contraction]) <= 100 * budget**2
        for link in problem.links.reads
        if problem.rounds_again(
            assignment[link.store] if link.store else "fp32",
            argument_format(link, assignment[link.contraction]),
        )
    )


def assert_optimal(problem: Problem, budget: float) -> None:
    """The solution is as fast as the fastest legal assignment within the budget."""
    best = min(
        plain_seconds(problem, assignment)
        for assignment in legal_assignments(problem)  # float32 everywhere always fits
        if problem.error(assignment) <= budget and trusted(problem, assignment, budget)
    )
    solution = solve(problem, budget, GAP)
    assert not list(problem.violations(solution.assignment))
    assert solution.error == problem.error(solution.assignment)
    assert solution.error <= budget * (1 + 1e-5)
    assert trusted(problem, solution.assignment, budget * (1 + 1e-5))
    assert solution.seconds == pytest.approx(plain_seconds(problem, solution.assignment), abs=1e-15)
    assert solution.bound <= best * (1 + 1e-6) + 1e-12
    assert solution.bound <= solution.seconds
    assert solution.seconds <= best * (1 + 2 * GAP) + 1e-10
    assert solution.gap <= 2 * GAP or solution.seconds <= best + 1e-10


@settings(many, max_examples=50)
@given(problems())
def test_the_optimum_fits_a_budget_of_exactly_its_own_error(problem: Problem) -> None:
    for assignment in itertools.islice(legal_assignments(problem), 0, None, 97):
        solution = solve(problem, problem.error(assignment), GAP)
        assert solution.seconds <= plain_seconds(problem, assignment) * (1 + 2 * GAP) + 1e-10


def small_problem() -> Problem:
    """One contraction that reads a parameter and writes a stored tensor."""
    links = Links(
        {"c": contraction("c")}, {"s": storage("s")}, (Link("c", 0, "p", None),), {"c": ("s",)}
    )
    prices = Prices(
        {"c": {"fp32": 9e-6, "bf16": 1e-6}},
        {"s": {"fp32": 2e-6, "bf16": 1e-6}},
        dict.fromkeys(("p", "s"), dict.fromkeys(ALL_FORMATS, 1e-6)),
    )
    statistics = Statistics({"s": sensitivity(1.0)}, {("c", 0): sensitivity(1.0)}, {})
    return Problem(links, {"c": ("fp32", "bf16"), "s": ("fp32", "bf16")}, prices, statistics)


@pytest.mark.parametrize(
    ("effects", "budget", "narrow"),
    [
        ((1.0, 1.1), 2.09, 1),  # independent ones would cause 1.49
        ((1.0, 1.1), 2.11, 2),
        ((1.0, -0.9), 0.11, 2),  # each alone is beyond the budget
        ((1.0, -0.9), 0.09, 0),
        ((1.0, -0.5), 0.51, 2),
        ((1.0, 0.2, -0.9), 0.15, 2),
        ((1.0, 1.0, -1.8), 0.25, 3),  # two that add up and a third that makes up for both
        ((1.0, 1.0, -0.95, -0.95), 0.12, 4),
        ((1.0, -0.99), 0.11, 2),
        ((1.0, -0.99), 0.09, 0),  # who would trust them to cancel so well?
    ],
)
def test_readers_of_one_copy_err_together(
    effects: tuple[float, ...], budget: float, narrow: int
) -> None:
    solution = solve(readers(*effects), budget * ROUNDING)
    assert list(solution.assignment.values()).count("bf16") == narrow
    assert solution.error <= budget * ROUNDING


def test_only_a_rounding_that_takes_place_makes_up_for_another() -> None:
    known = readers(1.0, -0.9)
    prices = {**known.prices.contractions, "c1": {"fp32": 9e-6, "bf16": 9e-5}}
    slow = replace(known, prices=replace(known.prices, contractions=prices))
    assert set(solve(slow, 0.11 * ROUNDING).assignment.values()) == {"fp32"}
    assert solve(slow, 1.01 * ROUNDING).assignment == {"c0": "bf16", "c1": "fp32"}


def test_zero_budget_keeps_float32_though_two_roundings_nearly_cancel() -> None:
    solution = solve(readers(1.0, -0.99), 0.0)
    assert set(solution.assignment.values()) == {"fp32"}
    assert solution.error == 0.0


@pytest.mark.parametrize("budget", [1e-5, 1e-7, 1e-9])
@pytest.mark.parametrize("effects", [(6.0, 6.0), (6.0, -5.9), (6.0, -6.0)])
def test_float32_fits_every_budget_however_small(
    effects: tuple[float, float], budget: float
) -> None:
    assert solve(readers(*effects), budget).error <= budget * (1 + 1e-5)


def test_zero_budget_keeps_float32_everywhere() -> None:
    solution = solve(small_problem(), 0.0)
    assert solution.assignment == {"c": "fp32", "s": "fp32"}
    assert solution.error == 0.0
    assert solution.bound == pytest.approx(solution.seconds)


def test_a_wide_budget_takes_the_fast_format_and_its_result_follows() -> None:
    assert fixes_result("bf16")
    assert solve(small_problem(), 1.0).assignment == {"c": "bf16", "s": "bf16"}


def test_a_budget_that_nothing_fits_is_an_error() -> None:
    vetoed = replace(small_problem(), options={"c": ("bf16",), "s": ("bf16",)})
    with pytest.raises(BudgetError, match="within 1e-09") as caught:
        solve(vetoed, 1e-9)
    assert "\n" not in str(caught.value)


def test_contradicting_vetoes_are_an_error_as_well() -> None:
    stuck = replace(small_problem(), options={"c": ("bf16",), "s": ("fp32",)})
    with pytest.raises(BudgetError):
        solve(stuck, 1.0)


def test_pass_keeps_the_solution_and_its_assignment() -> None:
    unit = bare_unit(small_problem(), limit=1.0)
    assert not ChooseFormats().run(unit)
    assert unit.solution is not None
    assert unit.assignment == dict(unit.solution.assignment) == {"c": "bf16", "s": "bf16"}


def test_pass_honours_the_limit_of_the_budget() -> None:
    unit: Unit = bare_unit(small_problem(), limit=0.0)
    ChooseFormats().run(unit)
    assert unit.assignment == {"c": "fp32", "s": "fp32"}
