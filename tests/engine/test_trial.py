"""Timed steps: which wins, and what is kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_compiler.calibrated import ANCHORS
from precision_compiler.measure import Machine, Traffic
from precision_compiler.trial import run_trial, verdict
from tests.models import gpt

PRICES = {"plan": 0.006, "fp32": 0.01, "autocast": 0.007}


def test_the_solver_wins_within_the_noise() -> None:
    trial = verdict({"plan": 1.0, "fp32": 0.99, "autocast": 1.2}, PRICES, ANCHORS)
    assert trial.winner == "plan"
    assert "nothing else was faster" in trial.sentence


@pytest.mark.parametrize("winner", ["fp32", "autocast"])
def test_what_is_faster_wins_and_the_sentence_says_so(winner: str) -> None:
    seconds = {"plan": 0.01, "fp32": 0.02, "autocast": 0.02} | {winner: 0.008}
    trial = verdict(seconds, PRICES, ANCHORS, now=False)
    assert trial.winner == winner
    assert "25% longer" in trial.sentence
    assert "8.0 ms" in trial.sentence
    assert "measured earlier" in trial.sentence


def machine_in(folder: Path) -> Machine:
    flat = Traffic((1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    return Machine("here", 1, {"fp32": 1.0}, flat, 0.0, folder / "here.json")


def test_steps_are_timed_once_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    case, machine = gpt(), machine_in(tmp_path)
    before = copy.deepcopy(case.model.state_dict())
    compiled: list[str] = []

    def compile_it(twin: nn.Module, label: str) -> nn.Module:
        assert twin is not case.model
        compiled.append(label)
        return twin

    digests, prices = {"plan": "a", "fp32": "b"}, {"plan": 1.0, "fp32": 2.0}
    first = run_trial(case.model, case.batch, case.loss, digests, prices, compile_it, machine)
    second = run_trial(case.model, case.batch, case.loss, digests, prices, compile_it, machine)
    assert first is not None
    assert second is not None
    assert compiled == ["plan", "fp32"]
    assert second.seconds == first.seconds
    assert second.calibrated == first.calibrated
    assert first.anchors == ("fp32",)
    assert first.calibrated is not None  # one step tells a rate
    assert first.calibrated.seconds(2.0) == pytest.approx(first.seconds["fp32"])
    assert all(value > 0 for value in first.seconds.values())
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    other: Any = gpt(batch=2).batch
    run_trial(case.model, other, case.loss, digests, prices, compile_it, machine)
    assert len(compiled) == 4  # another batch shape is another step


def test_a_model_that_cannot_be_copied_is_not_tried(tmp_path: Path) -> None:
    case = gpt()
    weight = next(case.model.parameters())
    case.model.derived = weight * 2  # not a leaf: copy.deepcopy refuses it

    def compile_it(_twin: nn.Module, _label: str) -> nn.Module:
        raise AssertionError("nothing is compiled")

    machine = machine_in(tmp_path)
    arguments = case.model, case.batch, case.loss, {"plan": "a"}, {"plan": 1.0}
    with pytest.warns(UserWarning, match="cannot be copied"):
        assert run_trial(*arguments, compile_it, machine) is None


def test_the_prediction_stands_beside_the_time_that_was_measured() -> None:
    seconds = {"plan": 0.0129, "fp32": 0.021, "autocast": 0.015}
    trial = verdict(seconds, PRICES, ANCHORS)
    rule = trial.calibrated
    assert rule is not None
    assert (rule.rate, rule.fixed) == pytest.approx((2.0, 0.001))
    assert "13.0 ms by calibration with float32 and autocast's formats" in trial.sentence
    assert "6.0 ms as a sum of prices, measured 12.9 ms" in trial.sentence


def test_a_step_that_calibrates_is_not_called_a_prediction(tmp_path: Path) -> None:
    machine = machine_in(tmp_path)
    case = gpt()

    def compile_it(twin: nn.Module, _label: str) -> nn.Module:
        return twin

    digests = {"plan": "a", "fp32": "b", "autocast": "a"}
    prices = {"plan": 1.0, "fp32": 2.0, "autocast": 1.0}
    trial = run_trial(case.model, case.batch, case.loss, digests, prices, compile_it, machine)
    assert trial is not None
    assert set(trial.anchors) == set(digests)
    assert "predicted for" not in trial.sentence
    assert "itself one of those that calibrate" in trial.sentence
