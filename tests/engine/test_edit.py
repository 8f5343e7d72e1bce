"""Edited plans: what was asked for, the best of the rest, and files that mean the same."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import precision_compiler
from precision_compiler.budget import Budget
from precision_compiler.calibrated import Calibrated
from precision_compiler.compiler import decide, plan_for, rewritten
from precision_compiler.edit import edit
from precision_compiler.errors import BudgetError, PlanError
from precision_compiler.joint import JointGraph
from precision_compiler.overrides import OVERRIDE
from precision_compiler.plan import Plan
from precision_compiler.report.diff import compare
from precision_compiler.solver import solve
from precision_compiler.thaw import problem_of
from tests.helpers import machine
from tests.models import captured, made, planned

SITE = "blocks.0.fc.wgrad"


@cache
def tight() -> Plan:
    """A plan whose budget decides."""
    return plan_for(captured("gpt"), machine(), Budget.parse(0.004))


@pytest.mark.parametrize("fmt", ["fp32", "tf32", "bf16", "fp16"])
def test_the_rest_is_the_best_that_goes_with_it(fmt: str) -> None:
    plan = tight()
    found = edit(plan, {SITE: fmt})
    problem = problem_of(plan)
    forced = replace(problem, options={**problem.options, SITE: (fmt,)})
    best = solve(forced, plan.budget.limit, 1e-6)
    assert found.sites[SITE].format == fmt
    assert found.sites[SITE].reason == f"{OVERRIDE} {SITE!r}"
    assert found.predicted_seconds == pytest.approx(best.seconds, rel=2e-4)
    assert found.predicted_gradient_error <= plan.budget.limit * (1 + 1e-9)
    assert found.predicted_seconds == pytest.approx(forced.seconds(found.assignment))
    assert found.totals.predicted_gradient_error == pytest.approx(forced.error(found.assignment))
    assert sum(site.variance_share for site in found.sites.values()) == pytest.approx(1.0)


def test_globs_and_earlier_edits_stay() -> None:
    first = edit(tight(), {"blocks.*.fc.wgrad": "fp32"})
    second = edit(first, {"blocks.*.fc.dgrad": "fp32"})
    for block in (0, 1):
        for role in ("wgrad", "dgrad"):
            assert second.sites[f"blocks.{block}.fc.{role}"].format == "fp32"
    third = edit(second, {SITE: "bf16"})  # a new one counts where both are about a site
    assert third.sites[SITE].format == "bf16"
    assert third.sites["blocks.1.fc.wgrad"].format == "fp32"
    assert [entry.step for entry in third.journal].count("edit") == 3


def test_predictions_of_an_edited_plan_stay_calibrated() -> None:
    plan = planned("gpt")
    rule = Calibrated(2.0, 0.5)
    found = edit(replace(plan, totals=replace(plan.totals, calibrated=rule)), {SITE: "fp32"})
    assert found.totals.calibrated_seconds == 0.5 + 2.0 * found.predicted_seconds


def test_what_was_measured_of_the_old_plan_is_not_the_new_one_s() -> None:
    found = edit(planned("gpt"), {SITE: "fp32"})
    assert planned("gpt").verification is not None
    assert found.verification is None
    assert found.trial is None
    assert not [node for node in found.nodes if node.reason.startswith("cast: ")]
    (node,) = [node for node in found.nodes if node.name == SITE]
    assert node.compute_format == "fp32"


def test_an_edit_of_nothing_else_leaves_everything_else() -> None:
    plan = planned("gpt")
    found = edit(plan, {SITE: plan.sites[SITE].format})
    assert found.predicted_seconds == pytest.approx(plan.predicted_seconds, rel=2e-3)
    assert found.fingerprint == plan.fingerprint


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
def test_casts_are_counted_as_those_of_a_new_plan_are(fmt: str) -> None:
    budget = Budget.parse(0.004)
    found = edit(tight(), {SITE: fmt})
    anew = decide(captured("gpt"), machine(), budget, overrides={SITE: fmt}).plan()
    assert found.assignment == anew.assignment  # or the counts may differ for that reason
    assert found.totals.casts == anew.totals.casts > 0
    unchanged = edit(tight(), {SITE: tight().sites[SITE].format})
    assert unchanged.totals.casts == tight().totals.casts
    differing = {change.name for change in compare(tight(), unchanged).totals}
    assert not differing & {"casts", "gap"}


@pytest.mark.parametrize("name", ["gpt", "llama", "mlp"])
def test_edit_save_load_rewrites_the_same_graph(name: str, tmp_path: Path) -> None:
    plan = planned(name)
    site = next(s for s, one in plan.sites.items() if one.kind == "contraction")
    edited = edit(plan, {site: "fp32" if plan.sites[site].format != "fp32" else "bf16"})
    edited.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == edited
    joint = captured(name).joint
    assert text_of(joint, again) == text_of(joint, edited)
    assert text_of(joint, edited) != text_of(joint, plan)


def text_of(joint: JointGraph, plan: Plan) -> str:
    return rewritten(joint, plan).print_readable(print_output=False)


def test_an_edited_plan_can_be_measured_and_compiled() -> None:
    case = made("gpt")
    plan = edit(planned("gpt"), {"blocks.*.fc.*grad": "fp32"})
    measured = precision_compiler.measure_error(case.model, case.batch, plan)
    assert measured.gradient_error < 2 * plan.predicted_gradient_error
    model = precision_compiler.compile(case.model, plan=plan)
    loss = model(*case.batch)
    loss.backward()
    assert torch.isfinite(loss.detach())


def test_mistakes_are_named() -> None:
    plan = planned("gpt")
    with pytest.raises(PlanError, match=r"matches no site; did you mean blocks\.0\.fc"):
        edit(plan, {"blocks.0.fcc.*": "bf16"})
    with pytest.raises(PlanError, match="contradict each other at blocks"):
        edit(plan, {SITE: "bf16", "blocks.0.*.wgrad": "fp32"})
    with pytest.raises(PlanError, match="cannot be nvfp4 on this target"):
        edit(plan, {SITE: "nvfp4"})
    with pytest.raises(PlanError, match="does not say what it was decided on"):
        edit(replace(plan, tables=None), {SITE: "bf16"})
    with pytest.raises(BudgetError):
        edit(tight(), {"*.fprop": "e4m3"})
