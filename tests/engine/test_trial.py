"""Timed steps: which wins, and what is kept."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from precision_compiler.measure import Machine, Traffic
from precision_compiler.trial import run_trial, verdict
from tests.models import gpt


def test_the_solver_wins_within_the_noise() -> None:
    trial = verdict({"plan": 1.0, "fp32": 0.99, "autocast": 1.2})
    assert trial.winner == "plan"
    assert "nothing else was faster" in trial.sentence


@pytest.mark.parametrize("winner", ["fp32", "autocast"])
def test_what_is_faster_wins_and_the_sentence_says_so(winner: str) -> None:
    seconds = {"plan": 0.01, "fp32": 0.02, "autocast": 0.02} | {winner: 0.008}
    trial = verdict(seconds, now=False)
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
    with pytest.warns(UserWarning, match="cannot be copied"):
        assert run_trial(case.model, case.batch, case.loss, digests, compile_it, machine) is None
