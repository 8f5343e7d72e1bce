"""Rehearsing: steps of training on the captured graph, of which the model notices nothing."""

from copy import deepcopy

import pytest
import torch

import precision_compiler
from precision_compiler.capture import capture
from precision_compiler.demo.model import GPT
from precision_compiler.errors import AnalysisError
from precision_compiler.rehearsal import rehearse
from precision_compiler.replay import gradients_of
from tests.models import made

STEPS, RATE = 4, 1e-2


def test_the_steps_are_those_of_torchs_optimizer() -> None:
    case = made("gpt")
    twin = deepcopy(case.model)
    optimizer = torch.optim.AdamW(twin.parameters(), betas=(0.9, 0.95))
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = twin(*case.batch) if isinstance(case.batch, tuple) else twin(**case.batch)
        loss.backward()
        optimizer.param_groups[0]["lr"] = RATE * step / STEPS
        optimizer.step()
    (found,) = rehearse([capture(case.model, case.batch)], [], STEPS, RATE)
    moved = dict(zip(found.joint.names, found.joint.inputs, strict=True))
    for name, parameter in twin.named_parameters():
        if not name.endswith(".weight"):
            continue  # the bias of attention keys has no gradient, and AdamW makes steps of noise
        torch.testing.assert_close(moved[name], parameter.detach(), rtol=1e-4, atol=1e-6)


def test_the_model_stays_where_it_was_and_the_loss_falls() -> None:
    case = made("gpt")
    before = deepcopy(case.model.state_dict())
    captured = capture(case.model, case.batch)
    trained, unseen = rehearse([captured], [captured.on(case.batch)], STEPS, RATE)
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    first, last = (float(gradients_of(one)[0]) for one in (captured, trained))
    assert last < 0.9 * first
    assert float(gradients_of(unseen)[0]) == pytest.approx(last)


def test_no_steps_change_nothing() -> None:
    case = made("gpt")
    captured = capture(case.model, case.batch)
    assert rehearse([captured], [], 0) == (captured,)


def test_a_rehearsal_that_diverges_says_what_to_do() -> None:
    case = made("gpt")
    with pytest.raises(AnalysisError, match=r"step \d+ of the rehearsal: give the learning rate"):
        rehearse([capture(case.model, case.batch)], [], 20, 1e30)


def test_a_model_without_weights_has_nothing_to_rehearse() -> None:
    with torch.device("meta"):
        model = GPT(layers=1, width=32, heads=2, length=8)
        tokens = torch.zeros(2, 8, dtype=torch.long)
    with pytest.raises(AnalysisError, match="meta device has no weights"):
        precision_compiler.make_plan(model, (tokens, tokens), target="h100", rehearsal=2)


def test_a_plan_is_for_the_rehearsed_weights() -> None:
    case = made("gpt")
    plans = [
        precision_compiler.make_plan(
            case.model, case.batch, target="h100", budget=0.1, rehearsal=steps, learning_rate=RATE
        )
        for steps in (0, STEPS)
    ]
    assert plans[1].totals.loss < 0.9 * plans[0].totals.loss
    assert plans[1].verification is not None
    assert plans[1].verification.measured.loss == pytest.approx(plans[1].totals.loss)
    assert list(plans[0].sites) == list(plans[1].sites)
    said = [entry.message for entry in plans[1].journal if "steps of training" in entry.message]
    assert said == [f"errors are those after {STEPS} steps of training in float32"]
