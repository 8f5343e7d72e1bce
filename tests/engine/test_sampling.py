"""Samples of large tensors: drawn evenly, and enough to tell variances and coherent errors."""

from collections.abc import Callable
from math import prod

import numpy as np
import pytest
import torch
from torch import Tensor

from precision_compiler.formats import FORMATS, quantised, ulp
from precision_compiler.observation import Observation, sensitivity_of
from precision_compiler.sampling import SAMPLE, sampled
from precision_compiler.statistics import COHERENT, METRICS, Sensitivity

BF16, E4M3 = FORMATS["bf16"], FORMATS["e4m3"]


def normal(seed: int, *shape: int) -> tuple[Tensor, Tensor]:
    """Values and derivatives."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=dice), torch.randn(shape, generator=dice)


@pytest.mark.parametrize("shape", [(512, 384), (1000, 7), (7, 1000), (16, 64, 48), (3, 10007)])
def test_sample_hits_every_row_and_column_evenly(shape: tuple[int, ...]) -> None:
    row = sampled(torch.arange(float(prod(shape))).reshape(shape), 4000).long()
    assert 1000 <= len(row) <= 4000
    assert len(torch.unique(row)) == len(row)
    rows, columns = row // prod(shape[1:]), row % shape[-1]
    for places, count in ((rows, shape[0]), (columns, shape[-1])):
        hits = torch.bincount(places, minlength=count)
        assert hits.max() - hits.min() <= 1


LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.t(),
    lambda x: x[::3, 1::2],
    lambda x: x[:, :1].expand(-1, 200),
    lambda x: x.reshape(40, 5, 200).permute(2, 0, 1),
    lambda x: x.as_strided((300, 100), (1, 7)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_values_meet_their_own_derivatives_whatever_the_strides(
    layout: Callable[[Tensor], Tensor],
) -> None:
    values = layout(torch.arange(40000.0).reshape(200, 200))
    plain = values.contiguous()
    assert not values.is_contiguous()
    assert torch.equal(sampled(values, 500), sampled(plain, 500))
    assert torch.equal(sampled(values, 1 << 20), plain.flatten())
    one = Observation(values, most=500).weight(sampled(plain, 500))
    other = Observation(plain, most=500).weight(sampled(values, 500))
    assert np.array_equal(one, other)


@pytest.mark.parametrize(("seed", "shape"), [(0, (1 << 19,)), (1, (700, 768)), (2, (1024, 1025))])
def test_sampled_variance_is_within_a_few_per_cent_of_the_full_sum(
    seed: int, shape: tuple[int, ...]
) -> None:
    values, adjoint = normal(seed, *shape)
    assert values.numel() > 10 * SAMPLE
    found = sensitivity_of(values, adjoint, ["e4m3"])
    expected = adjoint.double() * ulp(values, BF16)
    assert found.variance(BF16) == pytest.approx(float(expected.square().sum()) / 12, rel=0.05)
    real = adjoint.double() * (quantised(values, E4M3).double() - values.double())
    assert found.variance(E4M3) == pytest.approx(float(real.square().sum()), rel=0.05)


def test_largest_magnitude_is_that_of_all_elements() -> None:
    values = torch.ones(1 << 18)
    for place in range(5):
        values[place] = -100.0 - place
        assert Observation(values).insensitive.amax == 100.0 + place
    assert Observation(torch.tensor([1.0, -3.0, 2.0])).insensitive.amax == 3.0
    assert Observation(torch.tensor([])).insensitive.amax == 0.0
    assert Observation(torch.tensor([1.0])).insensitive.is_silent


@pytest.mark.parametrize("count", [16, 1000, SAMPLE, 8 * SAMPLE])
def test_equal_errors_of_a_constant_tensor_add_up(count: int) -> None:
    values, adjoint = torch.full((count,), 1.001), torch.full((count,), 0.5)
    found = sensitivity_of(values, adjoint, ["bf16"])
    assert found.is_coherent(BF16)
    exact = float((adjoint.double() * (values.bfloat16().double() - values.double())).sum()) ** 2
    assert found.variance(BF16) == pytest.approx(exact, rel=1e-3)
    if count <= SAMPLE:
        assert found.signed_ratio(BF16) == pytest.approx(count**0.5)


def repeated(seed: int, times: int) -> torch.Tensor:
    """64 rows of 256 normal numbers, each of them several times, in random order."""
    rows = normal(seed, 64 * 256)[0].reshape(64, 256)
    order = torch.randperm(64 * times, generator=torch.Generator().manual_seed(seed)) % 64
    return rows[order]


@pytest.mark.parametrize("times", [8, 32])
@pytest.mark.parametrize("name", ["bf16", "e4m3"])
def test_equal_elements_have_equal_errors(name: str, times: int) -> None:
    """Such as an embedding's where tokens repeat: their effects go together if derivatives do."""
    values, fmt = repeated(1, times), FORMATS[name]
    agreeing = repeated(1, times).sign()  # what depends on the number alone
    found = sensitivity_of(values, agreeing, [name])
    error = quantised(values, fmt).double() - values.double()
    exact = float((times * (error**2)).sum())
    assert found.variance(fmt) == pytest.approx(exact, rel=0.15)
    assert not found.is_coherent(fmt)
    single = sensitivity_of(values, normal(2, values.numel())[0].reshape(values.shape), [name])
    drawn = normal(2, values.numel())[0].reshape(values.shape).double() * error
    assert single.variance(fmt) == pytest.approx(float(drawn.square().sum()), rel=0.1)


def test_chance_agreement_of_a_sample_does_not_raise_the_mean_prediction() -> None:
    ratios = []
    for seed in range(3000):
        values, adjoint = normal(seed, 64 * 33)
        seen, row = Observation(values, [E4M3], most=64), sampled(adjoint, 64)
        weight = np.repeat(seen.weight(row)[None], len(METRICS), axis=0)
        found = Sensitivity(weight, seen.amax, seen.count, seen.size, seen.measured(row))
        real = adjoint.double() * (quantised(values, E4M3).double() - values.double())
        ratios.append(found.variance(E4M3) / float(real.square().sum()))
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_errors_of_random_tensors_rarely_seem_coherent() -> None:
    ratios = [sensitivity_of(*normal(s, 200), ["bf16"]).signed_ratio(BF16) for s in range(2000)]
    assert 1 <= sum(ratio > COHERENT for ratio in ratios) <= 12  # 0.27 % of a normal distribution
    assert np.mean(np.square(ratios)) == pytest.approx(1.0, abs=0.1)
