"""Models on the meta device: the same graph, errors from a smaller sibling, nothing measured."""

from dataclasses import replace
from math import log

import pytest
import torch

from precision_compiler import make_plan, measure_error
from precision_compiler.budget import Budget
from precision_compiler.capture import capture
from precision_compiler.compiler import plan_for
from precision_compiler.errors import AnalysisError, BudgetError
from precision_compiler.paper import lend
from precision_compiler.plan import Plan
from precision_compiler.sites import fingerprint
from tests.helpers import machine
from tests.models import MODELS, captured, gpt, made, planned


def weightless(name: str) -> tuple[torch.nn.Module, object]:
    case = made(name)
    return case.model.to("meta"), case.batch


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_weights_has_the_graph_of_the_real_one(name: str) -> None:
    case = made(name)
    found = capture(case.model.to("meta"), case.batch, case.loss).joint
    real = captured(name).joint
    assert [node.name for node in found.module.graph.nodes] == [
        node.name for node in real.module.graph.nodes
    ]
    assert fingerprint(found.sites) == fingerprint(real.sites)
    assert not found.has_values
    assert real.has_values


def test_the_users_module_is_left_as_it_was() -> None:
    model, batch = weightless("gpt")
    before = [(name, id(value)) for name, value in model.named_parameters()]
    capture(model, batch)
    assert [(name, id(value)) for name, value in model.named_parameters()] == before
    assert all(value.is_meta for value in model.parameters())


def test_a_plan_for_the_same_model_lends_every_site_its_own_error_and_vetoes() -> None:
    sibling = planned("gpt")
    loans = lend(captured("gpt").joint.sites, machine().formats, sibling)
    for name, choice in sibling.sites.items():
        assert loans[name].lender == name
        for fmt, option in choice.options.items():
            assert loans[name].variances[fmt] == pytest.approx(option.error**2)
            assert loans[name].vetoes.get(fmt) == option.veto


def test_deeper_stacks_borrow_by_relative_depth_and_share_the_error_out() -> None:
    sibling = planned("gpt")  # 2 blocks
    deeper = capture(gpt(blocks=5).model, made("gpt").batch).joint
    loans = lend(deeper.sites, machine().formats, sibling)
    lenders = [loans[f"blocks.{block}.fc.wgrad"].lender for block in range(5)]
    assert lenders[0] == "blocks.0.fc.wgrad"
    assert lenders[-1] == "blocks.1.fc.wgrad"
    assert lenders == sorted(lenders, key=str)
    own = sibling.sites["blocks.0.fc.wgrad"].options["bf16"].error ** 2
    assert loans["blocks.0.fc.wgrad"].variances["bf16"] == pytest.approx(own * 2 / 5)
    head = sibling.sites["linear.fprop"].options["bf16"].error ** 2
    assert loans["linear.fprop"].variances["bf16"] == pytest.approx(head)


def test_sites_the_sibling_lacks_follow_from_the_format() -> None:
    sibling = planned("gpt")
    known = {name: choice for name, choice in sibling.sites.items() if ".fc." not in name}
    loans = lend(captured("gpt").joint.sites, machine().formats, replace(sibling, sites=known))
    found = loans["blocks.1.fc.fprop"]
    assert found.lender is None
    assert found.variances["bf16"] == pytest.approx(2 / (8 * log(2)) * 4.0**-8 / 2)
    assert "fp32" not in found.variances
    assert loans["blocks.1.proj.fprop"].lender == "blocks.1.proj.fprop"


def test_the_plan_says_that_nothing_was_measured() -> None:
    model, batch = weightless("gpt")
    plan = make_plan(model, batch, target=machine(), budget=0.01, sibling=planned("gpt"))
    flag = next(flag for flag in plan.flags if flag.name == "unmeasured")
    assert flag.numbers["borrowed"] == flag.numbers["sites"] == len(plan.sites)
    assert plan.verification is None
    assert plan.totals.batches == 0
    assert 0 < plan.predicted_gradient_error <= 0.01
    assert Plan.from_json(plan.to_json()) == plan


def test_a_plan_on_paper_fits_the_real_model() -> None:
    case = made("gpt")
    plan = make_plan(case.model.to("meta"), case.batch, target=machine(), budget=0.02)
    real = made("gpt")
    found = measure_error(real.model, real.batch, plan)
    assert found.predicted_gradient_error == plan.predicted_gradient_error
    assert 0 < found.gradient_error < 0.2


def test_a_real_model_can_borrow_and_is_still_verified() -> None:
    plan = plan_for(captured("gpt"), machine(), Budget.parse(0.02), sibling=planned("gpt"))
    assert plan.verification is not None
    assert plan.verification.passed
    assert any(flag.name == "unmeasured" for flag in plan.flags)


def test_noise_budgets_and_measuring_say_what_is_missing() -> None:
    model, batch = weightless("gpt")
    with pytest.raises(BudgetError, match="no values"):
        make_plan(model, batch, target=machine(), budget="noise:0.1")
    with pytest.raises(AnalysisError, match="meta device"):
        measure_error(model, batch, planned("gpt"))


def test_prior_error_of_uniform_bf16_is_of_the_measured_size() -> None:
    model, batch = weightless("gpt")
    plan = make_plan(model, batch, target=machine(), budget=1.0)
    real = planned("gpt").totals.autocast_gradient_error
    assert real / 5 < plan.totals.autocast_gradient_error < real * 5
