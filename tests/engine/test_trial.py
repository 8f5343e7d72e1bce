"""Timed steps: which wins, what is kept, and what two of them tell about all others."""

import copy
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from precision_compiler.measure import Machine, Traffic
from precision_compiler.problem import Problem
from precision_compiler.trial import Calibrated, judged, run_trial
from tests.models import gpt
from tests.random_problems import legal_assignments, problems


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
    assert compiled == ["plan", "fp32"]
    assert second.seconds == first.seconds
    assert all(value > 0 for value in first.seconds.values())
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in case.model.parameters())
    other: Any = gpt(batch=2).batch
    run_trial(case.model, other, case.loss, digests, compile_it, machine)
    assert len(compiled) == 4  # another batch shape is another step


def parts(problem: Problem, assignment: Mapping[str, str]) -> tuple[float, float]:
    """Seconds of contractions, and of everything else that formats change."""
    prices, links = problem.prices, problem.links
    contractions = sum(prices.contractions[name][assignment[name]] for name in links.contractions)
    return contractions, problem.seconds(assignment) - contractions - prices.fixed


@settings(max_examples=60)
@given(problems(), st.floats(0.0, 5.0), st.floats(0.0, 1e-3), st.data())
def test_two_steps_tell_scale_and_fixed_time(
    problem: Problem, scale: float, fixed: float, data: st.DataObject
) -> None:
    known = list(islice(legal_assignments(problem), 50))
    baseline = data.draw(st.sampled_from(known))

    def true(assignment: Mapping[str, str]) -> float:
        contractions, traffic = parts(problem, assignment)
        return fixed + contractions + scale * traffic

    wide = problem.uniform()
    found = Calibrated(problem, baseline, true(wide), true(baseline))
    if parts(problem, wide)[1] - parts(problem, baseline)[1] > 1e-7:
        assert found.scale == pytest.approx(scale, abs=1e-6)
        for assignment in known:
            assert found.seconds(assignment) == pytest.approx(true(assignment))


@given(problems())
def test_impossible_steps_give_no_negative_times(problem: Problem) -> None:
    found = Calibrated(problem, problem.uniform(), 0.0, 1.0)
    assert found.fixed == 0.0
    assert 0.0 <= found.scale <= 5.0
