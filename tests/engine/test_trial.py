"""Timed steps: which wins, what is kept, and what two of them tell about all others."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from precision_compiler.measure import Machine, Traffic
from precision_compiler.trial import Calibrated, judged, run_trial
from tests.models import gpt


def test_the_solver_wins_within_the_noise() -> None:
    trial = judged({"plan": 1.0, "fp32": 0.99, "autocast": 1.2})
    assert trial.winner == "plan"
    assert "nothing else was faster" in trial.sentence


@pytest.mark.parametrize("winner", ["fp32", "autocast"])
def test_what_is_faster_wins_and_the_sentence_says_so(winner: str) -> None:
    seconds = {"plan": 0.01, "fp32": 0.02, "autocast": 0.02} | {winner: 0.008}
    trial = judged(seconds, now=False)
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

    digests = {"plan": "a", "fp32": "b"}
    first = run_trial(case.model, case.batch, case.loss, digests, compile_it, machine)
    second = run_trial(case.model, case.batch, case.loss, digests, compile_it, machine)
    assert first is not None
    assert second is not None
    assert compiled == ["plan", "fp32"]
    assert second.seconds == first.seconds
    assert all(value > 0 for value in first.seconds.values())
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    other: Any = gpt(batch=2).batch
    run_trial(case.model, other, case.loss, digests, compile_it, machine)
    assert len(compiled) == 4  # another batch shape is another step


def test_a_model_that_cannot_be_copied_is_not_tried(tmp_path: Path) -> None:
    case = gpt()
    weight = next(case.model.parameters())
    case.model.derived = weight * 2  # not a leaf: copy.deepcopy refuses it

    def compile_it(_twin: nn.Module, _label: str) -> nn.Module:
        raise AssertionError("nothing is compiled")

    machine = machine_in(tmp_path)
    digests = {"plan": "a"}
    assert run_trial(case.model, case.batch, case.loss, digests, compile_it, machine) is None


seconds = st.floats(1e-3, 10.0)


@given(seconds, seconds, st.floats(0.1, 5.0), st.floats(0.0, 1.0), seconds)
def test_two_steps_tell_rate_and_fixed_time(
    one: float, other: float, rate: float, fixed: float, third: float
) -> None:
    assume(abs(one - other) > 1e-3)
    slow, fast = max(one, other), min(one, other)
    found = Calibrated.of((slow, fast), (fixed + rate * slow, fixed + rate * fast))
    assert found.seconds(third) == pytest.approx(fixed + rate * third, rel=1e-6)


@given(seconds, seconds, seconds, seconds)
def test_measured_steps_come_out_and_no_time_is_negative(
    slow: float, fast: float, long: float, short: float
) -> None:
    found = Calibrated.of((slow, fast), (long, short))
    assert found.rate > 0
    assert found.fixed >= 0
    if slow > fast and long > short:
        assert found.seconds(slow) == pytest.approx(long)
