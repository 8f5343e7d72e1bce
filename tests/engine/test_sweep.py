"""The trade-off of time and error: monotone, and each point what the solver finds for its error."""

from itertools import islice, pairwise

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from precision_compiler.problem import Problem
from precision_compiler.solver import solve
from precision_compiler.sweep import frontier
from tests.random_problems import legal_assignments, plain_seconds, problems, readers, side_by_side

GAP = 1e-3
some = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
    phases=(Phase.generate, Phase.shrink),
)


@some
@given(problems())
def test_points_are_monotone_and_what_solve_finds_for_their_error(problem: Problem) -> None:
    points = frontier(problem, 6, GAP)
    assert points
    for point in points:
        assert not list(problem.violations(point.assignment))
        assert point.error == problem.error(point.assignment)
        assert point.seconds == pytest.approx(plain_seconds(problem, point.assignment), abs=1e-15)
        again = solve(problem, point.error, GAP)
        assert point.seconds <= again.seconds * (1 + 2 * GAP) + 1e-10
        assert point.bound <= again.seconds * (1 + 1e-6) + 1e-12
    for small, large in pairwise(points):
        assert small.error < large.error
        assert small.seconds > large.seconds


@some
@given(problems())
def test_ends_are_no_error_and_the_fastest_of_all(problem: Problem) -> None:
    points = frontier(problem, 4, GAP)
    legal = [each for each in legal_assignments(problem) if problem.error(each) <= 1]
    fastest = min(plain_seconds(problem, each) for each in legal)
    exact = min(plain_seconds(problem, each) for each in legal if problem.error(each) == 0)
    assert points[-1].seconds <= fastest * (1 + 2 * GAP) + 1e-10
    assert points[0].error <= 1e-7
    assert points[0].seconds <= exact * (1 + 2 * GAP) + 1e-10


def test_many_layers_give_as_many_points_as_asked_for_each_within_the_gap() -> None:
    problem = side_by_side(*[readers(1.0 + 0.05 * number, 0.3) for number in range(60)])
    told: list[tuple[int, int]] = []
    points = frontier(problem, 12, GAP, progress=lambda done, count: told.append((done, count)))
    assert len(points) >= 10
    assert all(point.gap <= 0.01 for point in points)
    assert [done for done, _ in told] == list(range(len(told)))


@some
@given(problems())
def test_no_assignment_that_it_goes_through_is_faster_than_its_points(problem: Problem) -> None:
    for assignment in islice(legal_assignments(problem), 5):
        error, seconds = problem.error(assignment), problem.seconds(assignment)
        points = frontier(problem, 3, GAP, through=[error])
        if error <= 1.0 and error >= points[0].error:
            best = min(point.seconds for point in points if point.error <= error * (1 + 1e-5))
            assert best <= seconds * (1 + 2 * GAP) + 1e-10


def test_where_float32_is_the_fastest_there_is_one_point() -> None:
    problem = readers(1.0)
    only = {name: ("fp32",) for name in problem.options}
    points = frontier(Problem(problem.links, only, problem.prices, problem.statistics))
    assert [point.error for point in points] == [0.0]
