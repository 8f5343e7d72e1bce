"""Budgets: what may be asked for, and which term sets the limit."""

from dataclasses import replace
from typing import Any

import pytest

from precision_compiler.budget import TRUST_REGION, Budget
from precision_compiler.errors import BudgetError, InternalError
from precision_compiler.passes.assign.set_budget import AUTO_NOISE, SetBudget, limited
from precision_compiler.pipeline import Unit
from tests.helpers import bare_unit
from tests.random_problems import ROUNDING, readers


def measured(asked: float | str, autocast: float, noise: float | None) -> Budget:
    """A budget that knows what it may rest on."""
    origin = "8 calibration batches" if noise is not None else "the batch cannot be split"
    parsed = Budget.parse(asked)
    return limited(replace(parsed, autocast=autocast, noise=noise, noise_origin=origin))


@pytest.mark.parametrize(
    ("asked", "autocast", "noise", "limit", "bound_by"),
    [
        (0.03, 0.01, 0.5, 0.03, "number"),
        (0, 0.01, 0.5, 0.0, "number"),
        (0.7, 0.01, None, 0.7, "number"),  # whoever gives a number means it
        ("autocast", 0.01, 0.5, 0.01, "autocast"),
        ("autocast", 0.4, 0.5, 0.4, "autocast"),
        ("autocast", 0.0, None, 0.0, "autocast"),
        ("noise:0.5", 0.01, 0.5, 0.25, "noise"),
        ("noise:2", 0.01, 3.0, 6.0, "noise"),
        ("noise:0", 0.01, 0.5, 0.0, "noise"),
        ("auto", 0.01, 0.5, 0.05, "noise"),
        ("auto", 0.06, 0.5, 0.06, "autocast"),
        ("auto", 0.06, None, 0.06, "autocast"),
        ("auto", 0.0, 0.0, 0.0, "autocast"),
        ("auto", 0.01, 2.1, 0.2, "trust region"),
        ("auto", 0.3, 0.1, 0.2, "trust region"),
        ("auto", 0.3, None, 0.2, "trust region"),
        ("auto", 0.2, None, 0.2, "autocast"),
        ("auto", 0.01, 2.0, 0.2, "noise"),
    ],
)
def test_limit_and_what_it_is_bound_by(
    asked: float | str, autocast: float, noise: float | None, limit: float, bound_by: str
) -> None:
    found = measured(asked, autocast, noise)
    assert found.limit == pytest.approx(limit)
    assert found.bound_by == bound_by
    assert (found.autocast, found.noise) == (autocast, noise)
    assert (AUTO_NOISE, TRUST_REGION) == (0.1, 0.2)


@pytest.mark.parametrize(
    ("asked", "autocast", "noise", "words"),
    [
        (0.03, 0.01, 0.5, "set by the user"),
        ("autocast", 0.01, 0.5, "predicted error of torch.autocast's bf16 policy"),
        ("noise:0.5", 0.01, 0.25, "0.5 of the noise 0.25, from 8 calibration batches"),
        ("auto", 0.01, 0.5, "0.1 of the noise 0.5, from 8 calibration batches"),
        ("auto", 0.06, 0.5, "predicted error of torch.autocast's bf16 policy on the same graph"),
        ("auto", 0.06, None, "same graph (the batch cannot be split)"),
        ("auto", 0.01, 3.0, "first-order analysis can vouch for; 0.1 of the noise 3"),
        ("auto", 0.01, 3.0, "from 8 calibration batches would be 0.3"),
        ("auto", 0.25, None, "same graph (the batch cannot be split) would be 0.25"),
    ],
)
def test_origin_says_where_the_number_comes_from(
    asked: float | str, autocast: float, noise: float | None, words: str
) -> None:
    assert words in measured(asked, autocast, noise).origin


def test_noise_that_is_not_known_is_an_error_if_it_is_asked_for() -> None:
    with pytest.raises(BudgetError) as caught:
        measured("noise:0.1", 0.01, None)
    message = str(caught.value)
    assert message.startswith("budget noise:0.1 needs the gradient's noise")
    assert "the batch cannot be split: give a number, or 'autocast'" in message
    assert "\n" not in message


def scored(asked: float | str, noise: float | None) -> Unit:
    """A unit whose baseline rounds one of two readings."""
    unit = bare_unit(readers(1.0, 3.0), limit=0.0)
    unit.budget = Budget.parse(asked)
    known = replace(unit.problem.statistics, noise=noise, noise_origin="2 parts of the batch")
    unit.statistics = known
    unit.baseline = {"c0": "fp32", "c1": "bf16"}
    assert not SetBudget().run(unit)
    return unit


def test_pass_takes_the_baselines_error_and_the_noise_of_the_statistics() -> None:
    found = scored("autocast", 0.5).budget
    assert found.limit == found.autocast == pytest.approx(3 * ROUNDING)
    assert (found.noise, found.noise_origin) == (0.5, "2 parts of the batch")
    found = scored("noise:0.5", 0.5).budget
    assert (found.limit, found.noise_factor) == (0.25, 0.5)
    assert scored("auto", 0.5).budget.limit == 0.05
    assert scored("auto", None).budget.limit == pytest.approx(3 * ROUNDING)


def test_numbers_keep_what_they_are_compared_with() -> None:
    found = scored(0.125, 0.5).budget
    assert (found.limit, found.origin, found.bound_by) == (0.125, "set by the user", "number")
    assert found.autocast == pytest.approx(3 * ROUNDING)
    assert found.noise == 0.5


def test_journal_has_the_limit_and_its_origin() -> None:
    unit = scored("auto", 0.5)
    assert unit.journal.entries[-1].step == "set-budget"
    assert unit.journal.entries[-1].message == f"the limit is 0.05: {unit.budget.origin}"


def test_running_before_the_analysis_is_our_bug() -> None:
    with pytest.raises(InternalError):
        SetBudget().run(bare_unit(readers(1.0), limit=0.0))


@pytest.mark.parametrize(
    ("asked", "limit"), [(0.01, 0.01), ("0.01", 0.01), (0, 0.0), (1, 1.0), ("1e-3", 1e-3)]
)
def test_budget_may_be_a_number(asked: float | str, limit: float) -> None:
    found = Budget.parse(asked)
    assert found.limit == limit
    assert float(found.asked) == limit
    assert (found.bound_by, found.noise_factor) == ("number", None)


@pytest.mark.parametrize(
    ("asked", "needed"),
    [("auto", True), ("noise:0.1", True), ("noise:0", True), ("autocast", False), (0.1, False)],
)
def test_noise_is_needed_where_the_limit_depends_on_it(asked: float | str, needed: bool) -> None:
    assert Budget.parse(asked).needs_noise == needed


@pytest.mark.parametrize(
    ("asked", "factor"),
    [("auto", None), ("autocast", None), ("noise:0.1", 0.1), ("noise:2", 2.0), ("noise:0", 0.0)],
)
def test_budget_may_be_a_word_that_waits_for_its_limit(asked: str, factor: float | None) -> None:
    found = Budget.parse(asked)
    assert (found.asked, found.limit, found.noise_factor) == (asked, float("inf"), factor)
    assert (found.bound_by, found.origin) == ("nothing yet", "not measured yet")
    assert (found.autocast, found.noise) == (None, None)


def test_noise_factor_is_written_in_one_way() -> None:
    assert Budget.parse("noise:1e-1").asked == "noise:0.1"
    assert Budget.parse("noise: 0.50").asked == "noise:0.5"


@pytest.mark.parametrize(
    "asked",
    [
        *("", "1%", "-0.1", "nan", "inf", "Auto", "automatic"),
        *("noise", "noise:", "noise:x", "noise:-1", "noise:nan", "noise:inf", "noise:0.1:2"),
        *("noisy:0.1", "autocast:0.5", "auto:1", ":0.1"),
        *(-1, float("nan"), float("inf"), None, [1], 1j),
    ],
)
def test_budget_of_another_kind_is_an_error_that_names_it(asked: Any) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(asked)
    assert repr(asked) in str(caught.value)
    assert "\n" not in str(caught.value)
