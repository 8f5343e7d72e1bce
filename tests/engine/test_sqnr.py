"""Signal to noise ratios: measured, by closed form, and as tabulated before this package was."""

from functools import cache

import numpy as np
import pytest
import torch

from precision_compiler.formats import (
    FORMATS,
    largest_magnitude,
    predicted_sqnr,
    rounding_variance,
    scale_exponent,
)
from precision_compiler.scaled import rounded
from precision_compiler.scaling import SCALINGS

COUNT = 2**20
LIGHT_TAILED = ("gauss", "laplace", "student-t4")

# Decibels for Gauss, Laplace, Student's t with 4 degrees of freedom; a million samples each.
TABLE = {
    ("e4m3", "1x128_fp32"): (31.8, 32.1, 32.4),
    ("e4m3", "mx_floor"): (30.6, 30.0, 29.8),
    ("e4m3", "mx"): (31.5, 31.6, 31.6),
    ("e5m2", "mx"): (25.5, 25.6, 25.6),
    ("e2m3", "mx"): (31.0, 30.2, 29.9),
    ("e3m2", "mx"): (25.5, 25.6, 25.6),
    ("e2m1", "mx_floor"): (18.8, 17.9, 17.6),
    ("e2m1", "mx"): (18.8, 17.6, 17.1),
    ("e2m1", "nvfp4"): (20.4, 20.7, 20.7),
}

IN_RANGE = (
    ("bf16", "none"),
    ("tf32", "none"),
    ("fp16", "none"),
    ("e4m3", "tensor"),
    ("e5m2", "tensor"),
    ("e4m3fnuz", "tensor"),
    ("e5m2fnuz", "tensor"),
    ("e4m3", "mx"),
    ("e5m2", "mx"),
    ("e3m2", "mx"),
)


@cache
def samples(name: str) -> torch.Tensor:
    """A million numbers, float32, in rows of 1024."""
    random = np.random.default_rng(0)
    if name == "laplace":
        drawn = random.laplace(size=COUNT)
    elif name == "student-t4":
        drawn = random.standard_t(4, COUNT)
    else:
        drawn = random.standard_normal(COUNT)
    if name == "lognormal":
        drawn = np.exp(2 * drawn) * random.choice([-1.0, 1.0], COUNT)
    return torch.from_numpy(drawn.astype(np.float32)).reshape(-1, 1024)


def noise(x: torch.Tensor, fmt: str, scaling: str) -> torch.Tensor:
    return (rounded(x, FORMATS[fmt], SCALINGS[scaling]) - x).double().square()


def sqnr(x: torch.Tensor, fmt: str, scaling: str) -> float:
    """Energy over energy of the error, dB."""
    ratio = x.double().square().sum() / noise(x, fmt, scaling).sum()
    return float(10 * ratio.log10())


@pytest.mark.parametrize(("fmt", "scaling"), IN_RANGE)
@pytest.mark.parametrize("name", LIGHT_TAILED)
def test_in_range_noise_is_the_closed_form(name: str, fmt: str, scaling: str) -> None:
    assert sqnr(samples(name), fmt, scaling) == pytest.approx(predicted_sqnr(FORMATS[fmt]), abs=0.3)


@pytest.mark.parametrize(("fmt", "scaling"), IN_RANGE)
def test_heavy_tails_have_the_same_noise_on_average_over_their_scale(
    fmt: str, scaling: str
) -> None:
    # A few dozen numbers of a million hold lognormal(2)'s energy: one draw is off by a decibel.
    # Over all positions of those numbers in their binade the closed form holds for any data.
    share = samples("lognormal").double().square()
    assert float(share.sum() ** 2 / share.square().sum()) < 100
    x = samples("lognormal")[:4]
    factors = np.exp2((np.arange(1000) + 0.5) / 1000).tolist()
    relative = [noise(x * f, fmt, scaling).sum() / (x * f).double().square().sum() for f in factors]
    found = float(-10 * torch.stack(relative).mean().log10())
    assert found == pytest.approx(predicted_sqnr(FORMATS[fmt]), abs=0.3)


@pytest.mark.parametrize(("fmt", "scaling"), TABLE)
def test_block_formats_have_the_noise_that_was_tabulated(fmt: str, scaling: str) -> None:
    found = tuple(sqnr(samples(name), fmt, scaling) for name in LIGHT_TAILED)
    assert found == pytest.approx(TABLE[fmt, scaling], abs=0.3)


@pytest.mark.parametrize("fmt", ["bf16", "fp16", "e4m3", "e5m2", "e4m3fnuz", "e2m3", "e3m2"])
@pytest.mark.parametrize("name", LIGHT_TAILED)
def test_per_tensor_noise_follows_from_the_histogram_of_exponents(name: str, fmt: str) -> None:
    x, row = samples(name), FORMATS[fmt]
    exponents = torch.frexp(x)[1].numpy() - 1
    shift = scale_exponent(largest_magnitude(x), row)
    predicted = rounding_variance(exponents, row, shift)[x.numpy() != 0].sum()
    measured = float(noise(x, fmt, "tensor" if row.scaled else "none").sum())
    assert 10 * np.log10(predicted / measured) == pytest.approx(0, abs=0.3)


def test_closed_form_is_six_decibels_a_bit() -> None:
    for fmt in FORMATS.values():
        assert predicted_sqnr(fmt) == pytest.approx(6.02 * fmt.precision + 7.45, abs=0.03)
