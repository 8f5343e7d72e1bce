"""The frontier of a plan, solved again from the plan itself, and its picture."""

from dataclasses import replace
from functools import cache
from math import log10

import pytest

from precision_compiler.errors import PlanError
from precision_compiler.frontier import Frontier
from precision_compiler.record import frontier_of_plan
from precision_compiler.report.curve import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve_of
from precision_compiler.report.html import report_html
from precision_compiler.thaw import problem_of
from tests.models import planned


@cache
def made() -> Frontier:
    return frontier_of_plan(planned("gpt"), points=6)


def test_the_plan_lies_on_its_own_frontier() -> None:
    found, plan = made(), planned("gpt")
    assert found.chosen.seconds == plan.predicted_seconds
    within = [p for p in found.points if p.error <= plan.predicted_gradient_error * (1 + 1e-9)]
    assert min(p.seconds for p in within) >= plan.totals.bound_seconds * (1 - 1e-9)
    beyond = [p for p in found.points if p.error >= plan.predicted_gradient_error]
    assert all(p.seconds <= plan.predicted_seconds * 1.01 for p in beyond)
    problem = problem_of(plan)
    assert found.fp32.seconds == pytest.approx(problem.seconds(problem.uniform()))
    assert found.autocast.seconds == pytest.approx(plan.totals.autocast_seconds)
    assert found.autocast.error == pytest.approx(plan.totals.autocast_gradient_error)


def test_points_fall_in_time_as_error_rises() -> None:
    points = made().points
    assert len(points) > 2
    assert [p.error for p in points] == sorted(p.error for p in points)
    assert [p.seconds for p in points] == sorted((p.seconds for p in points), reverse=True)


def test_marks_lie_where_their_numbers_are() -> None:
    found = made()
    curve = curve_of(found)
    marks = [*curve.plans, *curve.others]
    assert all(LEFT <= mark.x <= WIDTH - RIGHT for mark in marks)
    assert all(TOP <= mark.y <= HEIGHT - BOTTOM for mark in marks)
    assert [mark.name for mark in curve.others] == ["plan", "fp32", "autocast"]
    assert curve.others[1].x == LEFT  # an error of zero
    first, second = found.points[1], found.points[-1]
    a, b = curve.plans[1], curve.plans[-1]
    ticks = {text: place for place, text in curve.across}
    decade = ticks["0.01"] - ticks["0.001"]
    assert b.x - a.x == pytest.approx(decade * log10(second.error / first.error))
    zero = next(place for place, text in curve.up if float(text) == 0)
    assert (zero - a.y) / (zero - b.y) == pytest.approx(first.seconds / second.seconds)


def test_page_draws_it_and_lists_it() -> None:
    text = report_html(planned("gpt"), "plan.json", made())
    assert text.count("<circle") == len(made().points)
    assert "Time against error" in text
    assert f"autocast: error {made().autocast.error:.2g}" in text
    assert "Time against error" not in report_html(planned("gpt"), "plan.json")


def test_a_plan_that_was_not_solved_for_has_none() -> None:
    with pytest.raises(PlanError, match="does not say what it was decided on"):
        frontier_of_plan(replace(planned("gpt"), tables=None))
