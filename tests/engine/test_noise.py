"""Noise of the gradient: unbiased, split by samples, and silent about what it cannot know."""

import warnings
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.calling import Loss
from precision_compiler.capture import capture
from precision_compiler.errors import CaptureError
from precision_compiler.noise import MOST_PARTS, GradientSums, Noise, batch_noise, noise_of_parts

MEAN = 200.0  # of every element: far above the noise
TRACE = float(sum(s * s for s in range(1, 12)))  # of the covariance below


def samples(dice: np.random.Generator, count: int) -> np.ndarray:
    """Per-sample gradients of eleven elements with standard deviations 1 to 11, correlated."""
    base = dice.normal(size=(count, 11))
    mixed = 0.6 * base + 0.8 * np.roll(base, 1, axis=1)  # unit variances
    return MEAN + mixed * np.arange(1, 12)


def tensors(gradient: np.ndarray) -> list[Tensor]:
    """One gradient as a model has it, tensor by tensor."""
    flat = torch.tensor(gradient, dtype=torch.float32)
    return [flat[:6].reshape(3, 2), flat[6:]]


def norm(gradients: Iterable[Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in gradients]).double().norm())


def test_sums_give_the_trace_of_the_sample_covariance() -> None:
    drawn = samples(np.random.default_rng(0), 7)
    sums = GradientSums()
    for one in drawn:
        sums.add(tensors(one))
    assert sums.count == 7
    assert sums.variance == pytest.approx(np.trace(np.cov(drawn.T)), rel=1e-3)
    assert sums.mean_norm == pytest.approx(np.linalg.norm(drawn.mean(0)), rel=1e-6)


def test_equal_gradients_have_no_noise() -> None:
    sums, one = GradientSums(), tensors(samples(np.random.default_rng(0), 1)[0])
    for _ in range(5):
        sums.add(one)
    assert 0.0 <= sums.variance < 1e-5 * norm(one) ** 2


def test_gradients_that_are_added_are_left_alone() -> None:
    sums, one = GradientSums(), [torch.ones(3, requires_grad=True)]
    sums.add(one)
    sums.add(one)
    assert torch.equal(one[0], torch.ones(3))
    assert not sums.total[0].requires_grad


@pytest.mark.parametrize("batches", [2, 5])
def test_mean_over_many_draws_of_batches_is_the_true_variance(batches: int) -> None:
    dice, found = np.random.default_rng(1), []
    for _ in range(1500):
        sums = GradientSums()
        for _ in range(batches):
            sums.add(tensors(samples(dice, 4).mean(0)))
        deviation = batch_noise(sums).deviation
        assert deviation is not None
        found.append(deviation**2)
    assert np.mean(found) == pytest.approx(TRACE / 4, abs=4 * np.std(found) / len(found) ** 0.5)
    assert np.std(found) / len(found) ** 0.5 < 0.03 * TRACE / 4


@pytest.mark.parametrize("size", [2, 3, 5, 16])
def test_mean_over_many_draws_of_parts_is_the_variance_of_the_whole_batch(size: int) -> None:
    """Also where a sample is left over: the estimate is of the batch as it is."""
    dice, found = np.random.default_rng(2), []
    for _ in range(1500):
        batch = torch.tensor(samples(dice, size))
        noise = noise_of_parts(batch, mean_gradient, norm(mean_gradient(batch)))
        assert noise.deviation is not None
        found.append(noise.deviation**2)
    true = TRACE / size
    assert np.mean(found) == pytest.approx(true, abs=4 * np.std(found) / len(found) ** 0.5)
    assert np.std(found) / len(found) ** 0.5 < 0.05 * true


def mean_gradient(batch: Tensor) -> list[Tensor]:
    return tensors(batch.mean(0).numpy())


def parts_of(batch: Any) -> list[Any]:
    """What the gradients of a batch are asked for."""
    seen: list[Any] = []

    def gradients(part: Any) -> list[Tensor]:
        seen.append(part)
        return [torch.ones(2)]

    assert noise_of_parts(batch, gradients, 2**0.5).deviation is not None
    return seen


X, Y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
SHARED = torch.ones(1, 3)


def test_tensor_is_cut_along_its_first_dimension() -> None:
    first, second = parts_of(X)
    assert torch.equal(first, X[:2])
    assert torch.equal(second, X[2:])
    first, second = parts_of(torch.arange(7))
    assert [first.tolist(), second.tolist()] == [[0, 1, 2], [3, 4, 5]]


def test_tuples_and_dicts_are_cut_in_all_their_tensors_and_nothing_else() -> None:
    seen = parts_of((X, Y, SHARED, torch.tensor(2.0), 4, "mean", None))
    for (x, y, *rest), rows in zip(seen, (slice(0, 2), slice(2, 4)), strict=True):
        assert torch.equal(x, X[rows])
        assert torch.equal(y, Y[rows])
        assert rest[0] is SHARED
        assert rest[1:] == [torch.tensor(2.0), 4, "mean", None]
    seen = parts_of({"x": X, "inner": {"y": [Y, Y + 1]}, "flag": True})
    for part, rows in zip(seen, (slice(0, 2), slice(2, 4)), strict=True):
        assert list(part) == ["x", "inner", "flag"]
        assert torch.equal(part["x"], X[rows])
        assert torch.equal(part["inner"]["y"][1], Y[rows] + 1)
        assert part["flag"] is True


@pytest.mark.parametrize(
    "batch",
    [
        X[:1],
        (X, Y[:3]),
        (X[:1], SHARED),
        torch.tensor(1.0),
        (3, "words"),
        {},
        {"x": X, "positions": torch.arange(3)},
    ],
)
def test_batch_that_has_no_parts_says_so(batch: Any) -> None:
    def gradients(part: Any) -> list[Tensor]:
        raise AssertionError("nothing to run")

    found = noise_of_parts(batch, gradients, 1.0)
    assert found == Noise(None, "the batch cannot be split into parts: pass calibration batches")


def test_sentence_has_the_numbers() -> None:
    sums = GradientSums()
    for number in range(3):
        sums.add([torch.tensor([1.0 + number])])
    assert batch_noise(sums) == Noise(1.0, "3 calibration batches")
    found = noise_of_parts(torch.arange(17.0), lambda part: [torch.ones(2)], 2**0.5)
    assert found.origin == "2 parts of the batch, 8 each"
    assert MOST_PARTS == 2


def test_loss_that_fails_on_parts_says_why() -> None:
    def gradients(part: Any) -> list[Tensor]:
        raise CaptureError("the model fails on this batch (RuntimeError: sizes)")

    found = noise_of_parts(X, gradients, 1.0)
    assert found.deviation is None
    assert found.origin.startswith("the loss fails on parts of the batch (")
    assert "RuntimeError: sizes" in found.origin


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_parts_whose_mean_is_another_gradient_say_so(factor: float) -> None:
    whole = norm(mean_gradient(torch.full((4, 11), 1.0)))
    found = noise_of_parts(torch.full((4, 11), factor), mean_gradient, whole)
    assert found.deviation is None
    assert "have another mean gradient" in found.origin


LABELS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(16) % 4


@cache
def linear() -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Linear(8, 4), torch.randn(16, 8)


def of_model(loss: Loss) -> Noise:
    """The noise as the analysis asks for it."""
    model, x = linear()
    found = capture(model, x, loss)
    assert found.gradients is not None
    return noise_of_parts(x, found.gradients, norm(found.gradients(x)))


def by_hand(loss: Callable[[Tensor], Tensor]) -> float:
    """The deviation from the gradients of both halves."""
    model, x = linear()
    halves = [
        torch.autograd.grad(loss(model(half)), list(model.parameters())) for half in (x[:8], x[8:])
    ]
    apart = norm([a - b for a, b in zip(*halves, strict=True)])
    return apart / 2


def test_noise_of_a_model_is_the_difference_of_its_halves() -> None:
    found = of_model(lambda output, _: output.square().mean())
    assert found.deviation == pytest.approx(
        by_hand(lambda output: output.square().mean()), rel=1e-4
    )


@pytest.mark.parametrize(
    "loss",
    [
        lambda output, _: (output - LABELS).square().mean(),
        lambda output, _: F.cross_entropy(output, CLASSES),
        lambda output, _: (output * LABELS[:, :1]).sum(),
        lambda output, _: output[12:].square().mean(),
    ],
)
def test_loss_that_holds_on_to_the_whole_batch_is_noticed(loss: Loss) -> None:
    found = of_model(loss)
    assert found.deviation is None
    assert "parts of the batch" in found.origin


def test_loss_that_fails_on_parts_warns_of_nothing() -> None:
    """As in the README's example: torch warns of sizes in a run that nobody asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = of_model(lambda output, _: F.mse_loss(output, LABELS))
    assert found.deviation is None


@pytest.mark.parametrize("size", [2, 5, 16])
def test_noise_of_a_sum_over_samples_is_that_of_their_mean_times_their_number(size: int) -> None:
    """Each part of a sum has half of the gradient."""

    def of_sum(part: Tensor) -> list[Tensor]:
        return tensors(part.sum(0).numpy())

    for seed in range(8):
        batch = torch.tensor(samples(np.random.default_rng(seed), size))
        mean = noise_of_parts(batch, mean_gradient, norm(mean_gradient(batch)))
        found = noise_of_parts(batch, of_sum, norm(of_sum(batch)))
        assert mean.deviation is not None
        assert found.deviation == pytest.approx(size * mean.deviation, rel=0.02)
        assert found.origin == mean.origin
