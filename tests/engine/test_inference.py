"""Graphs without a backward pass: the error that is predicted is that of their outputs."""

import random

import pytest
import torch
from torch import nn

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture_inference
from precision_compiler.errors import AnalysisError
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.problem import Prices, Problem
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.target import Target
from precision_compiler.verification import emulated
from tests.onnx_files import Block


class Two(nn.Module):
    """Two float outputs and one of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden = self.block(x)
        logits = self.head(hidden)
        return hidden, logits.argmax(-1), logits


def measured(model: nn.Module, x: torch.Tensor) -> Unit:
    joint = capture_inference(model, x)
    found = Captured(joint, lambda _: torch.zeros(()), "outputs")
    unit = Unit(joint, Target.load("h100"), Budget.parse(0.1), Journal(), found)
    Pipeline((MeasureSensitivity(),)).run(unit)
    return unit


@pytest.fixture(scope="module")
def unit() -> Unit:
    torch.manual_seed(0)
    return measured(Two(), torch.randn(8, 16, 32))


def test_the_goals_are_the_float_outputs(unit: Unit) -> None:
    assert unit.joint.goal_names == ["output_0", "output_2"]
    assert unit.captured is not None
    loss, found = gradients_of(unit.captured)
    assert float(loss) == 0.0
    torch.manual_seed(0)
    hidden, _, logits = Two()(torch.randn(8, 16, 32))
    torch.testing.assert_close(found, [hidden.detach(), logits.detach()], atol=1e-5, rtol=1e-4)
    assert unit.statistics is not None
    norm = float(torch.cat([value.flatten() for value in found]).norm())
    assert unit.statistics.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert [tensor.name for tensor in unit.statistics.tensors] == ["output_0", "output_2"]


def test_random_assignments_err_as_predicted(unit: Unit) -> None:
    assert unit.captured is not None
    assert unit.statistics is not None
    _, exact = gradients_of(unit.captured)
    options = {site.name: ("fp32", "bf16", "fp16") for site in unit.joint.sites}
    problem = Problem(unit.links, options, Prices({}, {}, {}), unit.statistics)
    dice = random.Random(0)
    for _ in range(8):
        assignment = {name: dice.choice(formats) for name, formats in options.items()}
        for name, stores in unit.links.results.items():
            assignment |= dict.fromkeys(stores, assignment[name])
        _, found = gradients_of(unit.captured, emulated(unit.captured, assignment))
        ratio = relative_error(found, exact) / problem.error(assignment)
        assert 0.75 < ratio < 1.33


def test_nothing_is_kept_for_a_backward_pass(unit: Unit) -> None:
    assert unit._saved().elements == {}


def test_outputs_that_are_not_finite_are_refused() -> None:
    class Infinite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.log(x * 0) @ torch.ones(32, 32)

    with pytest.raises(AnalysisError, match="pass one with finite outputs"):
        measured(Infinite(), torch.randn(8, 32))
