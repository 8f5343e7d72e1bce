"""Explanations are what solving again says; the problem survives the way through a file."""

import io
import random
from dataclasses import replace
from functools import cache

import pytest
from rich.console import Console

from precision_compiler import PlanError
from precision_compiler.budget import Budget
from precision_compiler.calibrated import Calibrated
from precision_compiler.compiler import Decision, decide
from precision_compiler.errors import BudgetError
from precision_compiler.explain import GAP, explain, forced
from precision_compiler.outcomes import Trial
from precision_compiler.plan import Plan
from precision_compiler.problem import Problem
from precision_compiler.report.explanation import show_explanation
from precision_compiler.solver import solve
from precision_compiler.thaw import problem_of
from tests.helpers import machine
from tests.models import captured

FP8 = machine(fp32=1e12, bf16=4e12, e4m3=1.2e13)


@cache
def decided(model: str) -> Decision:
    """With a budget that the fastest plans are well within."""
    return decide(captured(model), FP8, Budget.parse(0.03))


@cache
def written(model: str) -> Plan:
    return Plan.from_json(decided(model).plan().to_json())


def random_assignment(problem: Problem, dice: random.Random) -> dict[str, str]:
    found = {name: dice.choice(formats) for name, formats in problem.options.items()}
    for name, stores in problem.links.results.items():
        for store in stores:
            if found[name] == "bf16" and "bf16" in problem.options[store]:
                found[store] = "bf16"
    return found


def test_alternatives_are_told_as_calibrated_steps_too() -> None:
    plan, site = written("mlp"), "up.fprop"
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    show_explanation(plan.explain(site), console)
    assert "calibrated" not in stream.getvalue()
    totals = replace(plan.totals, calibrated=Calibrated(2.0, 0.5))
    found = replace(plan, totals=totals).explain(site)
    show_explanation(found, console)
    assert "calibrated, ms" in stream.getvalue()
    for one in found.alternatives:
        if one.seconds is not None:
            assert f"{500 + 2e3 * one.seconds:.4g}" in stream.getvalue()


@pytest.mark.parametrize("model", ["mlp", "gpt", "llama", "explicit"])
def test_the_problem_of_a_plan_file_is_the_one_that_was_solved(model: str) -> None:
    original, thawed = decided(model).unit.problem, problem_of(written(model))
    assert thawed.options == original.options
    dice = random.Random(0)
    for _ in range(25):
        chosen = random_assignment(original, dice)
        assert thawed.seconds(chosen) == pytest.approx(original.seconds(chosen), rel=1e-12)
        assert thawed.variance(chosen) == pytest.approx(original.variance(chosen), rel=1e-9)
        assert set(thawed.violations(chosen)) == set(original.violations(chosen))


def test_explanation_equals_solving_again_for_every_site() -> None:
    plan, problem = written("gpt"), decided("gpt").unit.problem
    limit = plan.budget.limit
    best = solve(problem, limit, GAP)
    for site, choice in plan.sites.items():
        found = explain(plan, site)
        assert [one.format for one in found.alternatives] == list(choice.options)
        for one in found.alternatives:
            if one.format == choice.format:
                continue  # the plan itself
            try:
                again = solve(forced(problem, site, one.format), limit, GAP)
            except BudgetError:
                assert one.seconds is None
                continue
            assert one.seconds == pytest.approx(again.seconds, rel=2 * GAP)
            assert one.seconds_more == pytest.approx(
                again.seconds - best.seconds, abs=3 * GAP * best.seconds
            )
            assert one.error is not None
            assert one.error <= limit


def test_the_chosen_format_costs_nothing_more() -> None:
    plan = written("gpt")
    for site in list(plan.sites)[::7]:
        found = explain(plan, site)
        chosen = next(one for one in found.alternatives if one.format == found.format)
        assert chosen.seconds == plan.predicted_seconds
        assert not chosen.changed
        assert chosen.seconds_more is not None
        assert chosen.seconds_more <= 2e-3 * plan.predicted_seconds
        noise = 1e-12 * plan.predicted_seconds  # of adding up the same prices in another order
        assert chosen.seconds_more == 0.0 or chosen.seconds_more > noise
        assert chosen.veto is None


def test_what_binds_is_told_apart() -> None:
    plan = decide(captured("gpt"), FP8, Budget.parse(0.002)).plan()
    assert "budget" not in {explain(written("gpt"), site).binding for site in plan.sites}
    kinds = {site: explain(plan, site).binding for site in plan.sites}
    assert {"fastest", "budget", "result"} <= set(kinds.values())
    for site, kind in kinds.items():
        choice = plan.sites[site]
        faster = [o for o in choice.options.values() if o.seconds < choice.seconds]
        if kind == "fastest":
            assert not faster
        if kind == "veto":
            assert all(option.veto for option in faster)


def test_a_trial_that_decided_is_the_reason() -> None:
    trial = Trial({"plan": 2.0, "fp32": 1.0}, "fp32", "float32 is kept: measured")
    plan = replace(written("mlp"), trial=trial)
    site = next(iter(plan.sites))
    assert explain(plan, site).binding == "trial"
    assert explain(plan, site).sentence == trial.sentence


def test_an_unknown_site_is_answered_with_the_nearest() -> None:
    with pytest.raises(PlanError, match=r"no site up\.fprob; did you mean up\.fprop"):
        written("mlp").explain("up.fprob")


def test_a_plan_without_its_problem_says_so() -> None:
    with pytest.raises(PlanError, match="make it again"):
        replace(written("mlp"), tables=None).explain("up.fprop")
    tables = written("mlp").tables
    assert tables is not None
    broken = replace(written("mlp"), tables=replace(tables, nodes={}))
    with pytest.raises(PlanError, match="do not fit"):
        broken.explain("up.fprop")
