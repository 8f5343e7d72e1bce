"""Few elements that carry most of an error: a sample alone would be a gamble."""

from collections.abc import Callable
from math import inf, log

import pytest
import torch
from torch import Tensor

from precision_compiler.formats import FORMATS, quantised, ulp
from precision_compiler.observation import Observation, sensitivity_of
from precision_compiler.outliers import Outliers, find_outliers
from precision_compiler.sampling import SAMPLE, blocks_of_sample, sampled
from precision_compiler.statistics import COHERENT
from precision_compiler.watched import Watched

ROWS, COLUMNS = 1024, 384
LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x,
    lambda x: x.t(),
    lambda x: x.reshape(64, 16, COLUMNS).permute(1, 2, 0),
    lambda x: x[: ROWS - 3, 5:],  # with gaps, and no whole number of blocks
]


def with_sinks(seed: int, count: int, loud: float) -> tuple[Tensor, Tensor]:
    """Normal values and derivatives; in ``count`` rows one channel and its derivative stand out."""
    dice = torch.Generator().manual_seed(seed)
    values, adjoint = (torch.randn(ROWS, COLUMNS, generator=dice) for _ in range(2))
    rows = torch.randperm(ROWS, generator=dice)[:count]
    values[rows, 7] *= 10
    adjoint[rows, 7] *= loud
    return values, adjoint


def found(values: Tensor, adjoint: Tensor) -> Outliers | None:
    return find_outliers(values, adjoint, sampled(values) * sampled(adjoint), SAMPLE)


def real_variance(values: Tensor, adjoint: Tensor, name: str) -> float:
    error = quantised(values, FORMATS[name]).double() - values.double()
    return float((adjoint.double() * error).square().sum())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2"])
@pytest.mark.parametrize(("count", "loud"), [(3, 300.0), (32, 100.0), (100, 30.0)])
def test_error_that_few_elements_carry_is_not_missed(
    count: int, loud: float, name: str, layout: Callable[[Tensor], Tensor]
) -> None:
    values, adjoint = map(layout, with_sinks(count, count, loud))
    sensitivity = sensitivity_of(values, adjoint, [name])
    exact = real_variance(values, adjoint, name)
    assert sensitivity.measured[name].variance == pytest.approx(exact, rel=0.1)


def test_sample_alone_would_miss_it() -> None:
    ratios = []
    for seed in range(8):
        values, adjoint = with_sinks(seed, 3, 300.0)
        sample = Observation(values, [FORMATS["e4m3"]]).measured(sampled(adjoint))["e4m3"]
        ratios.append(sample.variance / real_variance(values, adjoint, "e4m3"))
    assert min(ratios) < 0.1
    assert max(abs(ratio - 1) for ratio in ratios) > 0.8


def test_mean_over_draws_is_that_of_all_elements_and_nothing_seems_coherent() -> None:
    ratios, signed = [], []
    for seed in range(60):
        values, adjoint = with_sinks(seed, 400, 12.0)  # more than are taken out
        sensitivity = sensitivity_of(values, adjoint, ["e4m3"])
        effect = sensitivity.measured["e4m3"]
        ratios.append(effect.variance / real_variance(values, adjoint, "e4m3"))
        signed.append(sensitivity.signed_ratio(FORMATS["e4m3"]))
    mean, spread = torch.tensor(ratios).mean(), torch.tensor(ratios).std()
    assert float(mean) == pytest.approx(1.0, abs=0.03)
    assert float(spread) < 0.15
    assert sum(ratio > COHERENT for ratio in signed) <= 2
    assert float(torch.tensor(signed).square().mean()) == pytest.approx(1.0, abs=0.6)


@pytest.mark.parametrize("share", [1.0, 0.1, 0.01, 0.001, 0.0001])
def test_sum_is_good_to_a_few_per_cent_however_few_elements_carry_it(share: float) -> None:
    """Also where nothing stands out: the sum over all elements says what the sample should be."""
    ratios = []
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        values, adjoint = (torch.randn(1 << 19, generator=dice) for _ in range(2))
        adjoint *= torch.rand(1 << 19, generator=dice) < share
        outliers = found(values, adjoint)
        assert outliers is not None
        assert (outliers.others is None) == (share > 0.01)
        exact = (adjoint.double() * ulp(values, FORMATS["bf16"])).square().sum() / 12
        ratios.append(sensitivity_of(values, adjoint).variance(FORMATS["bf16"]) / float(exact))
    assert max(abs(ratio - 1) for ratio in ratios) < 0.12
    assert float(torch.tensor(ratios).std()) < 0.05
    assert float(torch.tensor(ratios).mean()) == pytest.approx(1.0, abs=0.02)


def test_errors_of_outliers_in_further_formats_are_those_of_normal_numbers() -> None:
    values, adjoint = with_sinks(1, 128, 50.0)
    row = sampled(adjoint).double()
    outliers = found(values, adjoint)
    assert outliers is not None
    blocks = quantised(values, FORMATS["e4m3"]) - values  # as if they were known of the sample only
    _, effects = Observation(values).effects(row, outliers, {"mxfp8": sampled(blocks)})
    exact = real_variance(values, adjoint, "e4m3")
    assert effects["mxfp8"].variance == pytest.approx(exact, rel=0.5)
    assert effects["mxfp8"].signed <= COHERENT**2 * effects["mxfp8"].variance


def test_agreement_that_may_be_chance_is_not_called_coherent_however_it_is_scaled() -> None:
    """A signed sum of 3.5 times the independent one: too much for 3, too little for a sample."""
    values, adjoint = (
        torch.randn(1 << 19, generator=torch.Generator().manual_seed(s)) for s in (1, 2)
    )
    row, fmt = sampled(values), FORMATS["e4m3"]
    seen = Observation(values, [fmt])
    error = (quantised(row, fmt, seen.amax) - row).double()
    effect = sampled(adjoint) * error
    missing = 3.5 * float(effect.square().sum()) ** 0.5 - float(effect.sum())
    shifted = sampled(adjoint) + missing * error.sign() / float(error.abs().sum())
    ratio = abs(float((shifted * error).sum())) / float((shifted * error).square().sum()) ** 0.5
    assert COHERENT < ratio < (COHERENT**2 + 2 * log(seen.scale)) ** 0.5
    none = values[:0]
    for factor in torch.linspace(0.5, 2.0, 500).tolist():
        _, effects = seen.effects(shifted, Outliers(none, none, None, factor, factor), {})
        assert effects["e4m3"].signed <= COHERENT**2 * effects["e4m3"].variance


def test_every_second_error_tells_as_much_of_formats_by_block() -> None:
    values, adjoint = with_sinks(3, 0, 1.0)
    row, error = sampled(adjoint), sampled(quantised(values, FORMATS["e4m3"]) - values)
    seen, outliers = Observation(values), found(values, adjoint)
    whole = seen.effects(row, outliers, {"mxfp8": error})[1]["mxfp8"]
    half = seen.effects(row, outliers, {"mxfp8": error[::2]})[1]["mxfp8"]
    exact = real_variance(values, adjoint, "e4m3")
    assert whole.variance == pytest.approx(exact, rel=0.1)
    assert half.variance == pytest.approx(exact, rel=0.1)


def test_readers_that_share_outliers_go_together_as_far_as_their_sample_tells() -> None:
    values, adjoint = with_sinks(1, 400, 5.0)
    watched, e4m3 = Watched(values, float(values.abs().max()), SAMPLE), FORMATS["e4m3"]
    watched.take(("a", 0), 0, adjoint)
    watched.take(("b", 0), 0, 2 * adjoint)
    observed = watched.observed([e4m3])
    (pair,) = watched.correlations(observed)
    one, other = (watched.sensitivity(observed, (name, 0), {}) for name in "ab")
    assert other.variance(e4m3) == pytest.approx(4 * one.variance(e4m3), rel=1e-5)
    for fmt in (e4m3, FORMATS["bf16"]):
        both = (one.variance(fmt) * other.variance(fmt)) ** 0.5
        assert 0.5 * both < pair.covariance(fmt) < 2 * both


def flushing(seed: int) -> tuple[Tensor, Tensor]:
    """A softmax's gradient: few labels, some likely words, and many that e4m3 takes for zero."""
    dice = torch.Generator().manual_seed(seed)
    values = torch.rand(64, 16384, generator=dice) * 1e-9
    words = torch.randint(0, 16384, (64, 40), generator=dice)
    values.scatter_(1, words, torch.rand(64, 40, generator=dice) * 1e-3)
    values.scatter_(1, words[:, :1], -7e-3)
    return values, torch.randn(64, 16384, generator=dice) + 1.0


@pytest.mark.parametrize("seed", range(6))
def test_small_numbers_that_are_lost_do_not_stand_for_large_ones(seed: int) -> None:
    """A sample may have none of the large ones; nor must the small ones' errors be forgotten."""
    values, adjoint = flushing(seed)
    fmt = FORMATS["e4m3"]
    sensitivity = sensitivity_of(values, adjoint, ["e4m3"])
    error = quantised(values, fmt).double() - values.double()
    independent = real_variance(values, adjoint, "e4m3")
    signed = float((error * adjoint).sum()) ** 2
    assert sensitivity.variance(fmt) < 10 * max(independent, signed)
    assert sensitivity.variance(fmt) > 0.1 * independent
    assert sensitivity.flushed(fmt) > 0.9


@pytest.mark.parametrize("shape", [(40, 500), (7, 3001), (16, 11, 130)])
@pytest.mark.parametrize("turned", [False, True])
def test_sampled_elements_are_found_in_their_blocks(shape: tuple[int, ...], turned: bool) -> None:
    size = torch.Size(shape).numel()
    values = torch.arange(float(size)).view(shape)  # in the order of memory
    values = values.movedim(0, -1) if turned else values
    expected = sampled(values, 1000).long() // 32
    assert torch.equal(blocks_of_sample(values, 32, 1000), expected)


@pytest.mark.parametrize("bad", [0.0, inf, float("nan")])
def test_nothing_is_said_of_what_is_seen_whole_or_not_finite(bad: float) -> None:
    values, adjoint = with_sinks(0, 3, 30.0)
    assert found(values.flatten()[:SAMPLE], adjoint.flatten()[:SAMPLE]) is None
    assert found(values, torch.full_like(adjoint, bad)) is None


def test_what_no_sampled_element_carries_is_seen() -> None:
    values, adjoint = torch.ones(ROWS, COLUMNS) * 1.01, torch.zeros(ROWS, COLUMNS)
    hidden = int(sampled(torch.arange(float(values.numel())))[100]) + 1
    adjoint.view(-1)[hidden] = 3.0
    assert not sampled(adjoint).any()
    sensitivity = sensitivity_of(values, adjoint, ["bf16"])
    exact = real_variance(values, adjoint, "bf16")
    assert sensitivity.measured["bf16"].variance == pytest.approx(exact, rel=1e-5)
