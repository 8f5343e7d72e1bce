"""Stochastic rounding: one of two neighbours, without bias, the same for the same seed."""

import numpy as np
import pytest
import torch

from precision_compiler.errors import FormatError
from precision_compiler.formats import E8M0, FORMATS, Format, round_stochastically, round_to, ulp
from precision_compiler.scaled import dequantise, quantise, rounded
from precision_compiler.scaling import MX, NVFP4, TENSOR

NARROW = [name for name in FORMATS if name != "fp32"]
DRAWS = 4000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(fmt: Format, count: int) -> torch.Tensor:
    """Random numbers of both signs from the subnormals to the largest, and some beyond it."""
    low = max(fmt.min_exponent - fmt.precision - 2, -126)
    high = min(np.log2(fmt.max_finite) + 0.5, 127.9)
    power = low + (high - low) * torch.rand(count, generator=seeded(1), dtype=torch.float64)
    sign = torch.randint(0, 2, (count,), generator=seeded(2)) * 2 - 1
    return (sign * torch.exp2(power)).float()


@pytest.mark.parametrize("name", NARROW)
def test_only_ever_one_of_the_two_neighbours(name: str) -> None:
    fmt = FORMATS[name]
    x = values(fmt, 200_000)
    found = round_stochastically(x, fmt, seeded())
    assert torch.equal(round_to(found, fmt), found)
    inside = x.double().clamp(-fmt.max_finite, fmt.max_finite)
    low = (inside / ulp(inside, fmt)).floor() * ulp(inside, fmt)
    high = (inside / ulp(inside, fmt)).ceil() * ulp(inside, fmt)
    assert bool(((found == low) | (found == high)).all())
    assert 0.3 < float((found == low)[low != high].double().mean()) < 0.7


@pytest.mark.parametrize("name", NARROW)
def test_unbiased_within_five_standard_deviations(name: str) -> None:
    fmt = FORMATS[name]
    x = values(fmt, 100)
    x = x[x.abs() <= fmt.max_finite]
    found = round_stochastically(x.expand(DRAWS, -1), fmt, seeded(3)).double()
    step = ulp(x, fmt)
    fraction = x.double().abs() / step % 1
    deviation = step * (fraction * (1 - fraction) / DRAWS).sqrt()
    error = (found.mean(0) - x.double()).abs()
    assert bool((error <= 5 * deviation + step * 2.0**-24).all())


def test_numbers_of_the_format_stay() -> None:
    for name in NARROW:
        fmt = FORMATS[name]
        grid = round_to(values(fmt, 10_000), fmt, saturate=True)
        assert torch.equal(round_stochastically(grid, fmt, seeded(4)), grid)


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    x = torch.randn(64, 64, generator=seeded(5))
    for scaling in (MX, NVFP4, TENSOR):
        first, again, other = (
            rounded(x, FORMATS["e2m1"], scaling, rounding="stochastic", generator=seeded(seed))
            for seed in (6, 6, 7)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        stored = quantise(x, FORMATS["e2m1"], scaling, rounding="stochastic", generator=seeded(6))
        assert torch.equal(dequantise(stored), first)


def test_twice_the_noise_of_rounding_to_nearest() -> None:
    x = torch.randn(1000, 1000, generator=seeded(8))
    fmt = FORMATS["e4m3"]
    nearest = (rounded(x, fmt, MX) - x).square().mean()
    drawn = rounded(x, fmt, MX, rounding="stochastic", generator=seeded(9))
    assert float((drawn - x).square().mean() / nearest) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("name", NARROW)
def test_special_numbers(name: str) -> None:
    fmt, last = FORMATS[name], FORMATS[name].max_finite
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    found = round_stochastically(x, fmt, seeded())
    assert found[:2].tolist() == [last, -last]
    assert found.isnan().tolist() == [False, False, True, False, False]
    assert found[3:].signbit().tolist() == [False, fmt.has_negative_zero]


def test_what_it_needs_is_said() -> None:
    x = torch.ones(4)
    for given, fmt in ((x.double(), FORMATS["e2m1"]), (x, E8M0)):
        with pytest.raises(FormatError, match="takes float32 and a signed format"):
            round_stochastically(given, fmt, seeded())
