"""Gradients that are zero by structure, told from small ones."""

import pytest
import torch
from torch import Tensor, nn

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.statistics import Statistics
from tests.helpers import machine
from tests.models import captured

AMPLE, LITTLE = 1e15, 1e3  # bytes: all chunks of the graph are kept, or none


class Shifted(nn.Module):
    """A bias that a normalisation takes out again, and a parameter of little effect."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 24), nn.BatchNorm1d(24)
        self.little = nn.Parameter(torch.ones(24))
        self.noise = noise

    def forward(self, x: Tensor) -> Tensor:
        other, hidden, wide = torch.zeros(()), self.linear(x), x.repeat(1, 2)[:, :24]
        if self.noise:
            other = torch.rand_like(x).mean()
            hidden = hidden + self.noise * torch.randn_like(hidden)
        y = self.norm(hidden) + 1e-6 * self.little * wide
        loss: Tensor = (y - wide).square().mean() + other
        return loss


def measured(found: Captured, memory: float) -> Statistics:
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found, memory=memory)
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    return unit.statistics


def zeros(stats: Statistics) -> set[str]:
    return {tensor.name for tensor in stats.tensors if tensor.is_zero}


@pytest.mark.parametrize("memory", [AMPLE, LITTLE])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_gradients_of_float32_noise_are_told_from_small_ones(noise: float, memory: float) -> None:
    """Also where the way to them leads through random numbers, which have to be drawn again."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = capture(Shifted(noise), torch.randn(64, 16))
        stats = measured(found, memory)
    assert zeros(stats) == {"linear.bias"}
    (little,) = (tensor for tensor in stats.tensors if tensor.name == "little")
    assert 0 < little.norm < 1e-4 * stats.gradient_norm
    assert little.noise > 0


@pytest.mark.parametrize("memory", [AMPLE, LITTLE])
@pytest.mark.parametrize("name", ["explicit", "vit", "gpt", "dropout", "llama"])
def test_structurally_zero_gradients_are_those_of_key_biases(name: str, memory: float) -> None:
    found = zeros(measured(captured(name), memory))
    assert found == ({"key.bias"} if name == "explicit" else set())
