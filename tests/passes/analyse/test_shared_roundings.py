"""What hooks find: readings that go together, stores that round nothing, sums of one sign."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.formats import FORMATS
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.problem import Prices, Problem
from precision_compiler.replay import gradients_of
from precision_compiler.statistics import Statistics
from precision_compiler.verification import Truth, emulated
from tests.helpers import machine
from tests.models import captured


def measured(found: Captured) -> Statistics:
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    return unit.statistics


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Twice(nn.Module):
    """Two products of the same two tensors, the second weighed by a factor and added."""

    mixer: Tensor

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(40, 48, generator=generator(0)) / 8)
        self.register_buffer("mixer", torch.randn(48, 32, generator=generator(1)))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y @ self.mixer + self.factor * (self.mixer.T @ y.T).T


@pytest.mark.parametrize("fmt", ["tf32", "e4m3"])
@pytest.mark.parametrize(("factor", "without"), [(-0.9, 1.81**0.5 / 0.1), (1.0, 2**-0.5)])
def test_readers_of_one_rounded_tensor_are_predicted_together(
    factor: float, without: float, fmt: str
) -> None:
    """Errors e and -0.9 e leave 0.1 e, not 1.35 e; e and e make 2 e, not 1.41 e."""
    x, y = torch.randn(64, 40, generator=generator(2)), torch.randn(64, 32, generator=generator(3))
    found = capture(Twice(factor), x, lambda output, _: (output - y).square().mean())
    stats = measured(found)
    problem = Problem(find_links(found.joint), {}, Prices({}, {}, {}), stats)
    apart = replace(problem, statistics=replace(stats, correlations=()), _cache={})
    formats = dict.fromkeys((site.name for site in found.joint.sites), "fp32")
    formats |= {"matmul.fprop": fmt, "matmul_1.fprop": fmt}
    real = Truth(found, ()).measure(formats, 1.0, 1.0).gradient_error
    assert problem.error(formats) == pytest.approx(real, rel=0.12)
    assert apart.error(formats) / problem.error(formats) == pytest.approx(without, rel=0.1)


class Between(nn.Module):
    """A function between two products, so that its argument and its result are stored."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(32, 48)
        self.second = nn.Linear(48, 16, bias=False)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        z = self.function(self.first(x))
        loss: Tensor = self.second(z).square().mean()
        return loss


MASK = torch.rand(64, 48, generator=generator(4)) < 0.5

EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "neg": torch.neg,
    "power of two": lambda y: y * 0.125,
    "cat": lambda y: torch.cat([y[32:], y[:32]]),
    "dropout of a half": lambda y: F.dropout(y, 0.5),
    "where": lambda y: torch.where(MASK, y, 0.0),
    "where of both signs": lambda y: torch.where(MASK, y, -y),
    "leaky by a power of two": lambda y: F.leaky_relu(y, 0.25),
}
INEXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "times 0.3": lambda y: y * 0.3,
    "dropout of 0.3": lambda y: F.dropout(y, 0.3),
    "add": lambda y: y + 1.0,
    "sum of two": lambda y: y + y.roll(1, 0),
    "square": torch.square,
    "leaky": F.leaky_relu,
    "hardtanh of few": lambda y: F.hardtanh(y, -2.1, 2.1) * 1.1,
}


def stored_between(function: Callable[[Tensor], Tensor]) -> tuple[Statistics, str, str]:
    """Statistics, and the storage sites before and after the function."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = capture(Between(function), torch.randn(64, 32))
    stores = {
        (link.contraction, link.argument): link.store for link in find_links(found.joint).reads
    }
    before, after = "first.fprop.store", stores["second.fprop", 0]
    return measured(found), before, str(after)


@pytest.mark.parametrize("name", EXACT)
def test_store_of_moved_bits_rounds_nothing_once_its_source_is_rounded(name: str) -> None:
    stats, before, after = stored_between(EXACT[name])
    assert after != before
    assert stats.exact[after] == (before,)


@pytest.mark.parametrize("name", INEXACT)
def test_store_of_computed_numbers_is_rounded_on_its_own(name: str) -> None:
    stats, before, after = stored_between(INEXACT[name])
    assert after != before
    assert after not in stats.exact


def test_store_of_two_tensors_bits_names_both() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(32, 48), nn.Linear(32, 48)
            self.second = nn.Linear(96, 16)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([self.one(x), -self.two(x)], 1)
            loss: Tensor = self.second(joined).square().mean()
            return loss

    stats = measured(capture(Joined(), torch.randn(64, 32, generator=generator(7))))
    assert set(stats.exact["cat.store"]) == {"one.fprop.store", "two.fprop.store"}


@pytest.mark.parametrize("name", ["gpt", "llama", "explicit"])
def test_rounding_what_is_exact_changes_no_bit_of_a_gradient(name: str) -> None:
    found = captured(name)
    stats = measured(found)
    assert stats.exact
    fp32 = dict.fromkeys((site.name for site in found.joint.sites), "fp32")
    every = fp32 | dict.fromkeys(stats.stores, "bf16")
    without = every | dict.fromkeys(stats.exact, "fp32")
    one, other = (gradients_of(found, emulated(found, chosen))[1] for chosen in (every, without))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_flipped_tensors_are_measured() -> None:
    """Their primitive operation has no derivative of its own in torch."""
    stats, before, _ = stored_between(lambda y: y + y.flip(0))
    assert stats.stores[before].variance(FORMATS["bf16"]) > 0


def test_sums_count_the_terms_that_pull_one_way() -> None:
    """512 equal numbers are 512 terms; signs at random leave about as many as chance does."""

    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(16, 512))

        def forward(self, x: Tensor) -> Tensor:
            equal = (self.weight * 3).sum(1)
            mixed = (self.weight * x).mean(1)
            return (equal * mixed).square().sum()

    x = torch.randn(16, 512, generator=generator(6))
    sums = measured(capture(Sums(), x)).sums
    assert sums["sum"] == pytest.approx(512)
    assert sums["mean"] == pytest.approx(
        512 * abs(x.mean().item()) / x.square().mean().item() ** 0.5
    )
    assert sums["mean"] < 10


def test_ranges_are_those_of_tensors_that_are_no_site() -> None:
    stats = measured(captured("llama"))
    square = stats.ranges["norm1.pow"]
    x = captured("llama").joint.inputs
    largest = max(float(value.abs().max()) for value in x if value.shape == (4, 12, 32))
    assert square.amax == pytest.approx(largest**2, rel=1e-6)
    assert square.size == 4 * 12 * 32
    assert square.is_silent
    assert not set(stats.ranges) & {store.removesuffix(".store") for store in stats.stores}
    assert square.flushed(FORMATS["bf16"]) == 0.0
