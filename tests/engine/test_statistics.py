"""Histograms by binade against the sums they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precision_compiler.formats import FORMATS, Format, ulp
from precision_compiler.statistics import insensitive, sensitivity_of, weight_of

SMALLEST = 2.0**-126


def spread(seed: int, low: int = -140, high: int = 127) -> tuple[Tensor, Tensor]:
    """Values over many binades, zeros and subnormals included, and derivatives."""
    dice = np.random.default_rng(seed)
    exponents = dice.integers(low, high, 3000)
    values = np.exp2(exponents.astype(np.float64)) * dice.uniform(1, 2, 3000)
    values *= dice.choice([-1, 1, 0], 3000, p=[0.45, 0.45, 0.1])
    adjoint = dice.normal(size=3000) * np.exp2(dice.integers(-10, 10, 3000))
    return torch.tensor(values, dtype=torch.float32), torch.tensor(adjoint, dtype=torch.float32)


def directly(values: Tensor, adjoint: Tensor, fmt: Format) -> float:
    """Element by element: h^2 ulp^2 / 12, and h^2 E[y^2] where a whole binade rounds to zero."""
    steps = ulp(values, fmt)
    errors = steps.square() / 12
    _, exponent = torch.frexp(values.double())
    lost = exponent - 1 < fmt.min_exponent - fmt.precision
    flushed = 7 / 3 * torch.exp2(2.0 * (exponent - 1).double())
    errors = torch.where(lost, flushed, errors)
    errors[values.abs() < SMALLEST] = 0.0  # zeros, and subnormals which count as such
    return float((adjoint.double().square() * errors).sum())


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
@pytest.mark.parametrize("seed", range(4))
def test_variance_is_the_sum_over_the_elements(name: str, seed: int) -> None:
    values, adjoint = spread(seed, -30, 20) if name == "fp16" else spread(seed)
    found = sensitivity_of(values, adjoint).variance(FORMATS[name])
    assert found == pytest.approx(directly(values, adjoint, FORMATS[name]), rel=1e-9)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_scaled_variance_is_that_of_the_scaled_elements(name: str, size: float) -> None:
    fmt = FORMATS[name]
    values, adjoint = spread(0, -12, 3)
    values = (values.double() * size).float()
    sensitivity = sensitivity_of(values, adjoint)
    scale = sensitivity.scale_exponent(fmt)
    top = values.abs().amax().double().item() * 2.0**scale
    assert fmt.max_finite / 2 < top <= fmt.max_finite
    scaled = values.double() * 2.0**scale
    expected = directly(scaled.float(), adjoint, fmt) * 4.0**-scale
    assert sensitivity.variance(fmt) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-100, 90), st.integers(-10, 10))
def test_drift_is_the_relative_error_of_shifted_values(exponent: int, drift: int) -> None:
    fmt = FORMATS["bf16"]
    value = torch.tensor([2.0**exponent])
    moved = torch.tensor([2.0 ** (exponent + drift)])
    adjoint = torch.ones(1)
    here = sensitivity_of(value, adjoint).variance(fmt, drift)
    there = sensitivity_of(moved, adjoint).variance(fmt)
    assert here / value.item() ** 2 == pytest.approx(there / moved.item() ** 2)


def test_weight_holds_every_square_in_its_binade() -> None:
    values = torch.tensor([0.0, -0.0, 1e-40, SMALLEST, 1.0, -1.5, 1.9999, 2.0, 3e38])
    adjoint = torch.arange(1.0, 10.0)
    weight = weight_of(values, adjoint)
    assert len(weight) == 255
    expected = np.zeros(255)
    expected[0] = 16  # 2^-126
    expected[126] = 25 + 36 + 49  # 2^0
    expected[127] = 64
    expected[253] = 81  # 2^127
    assert np.array_equal(weight, expected)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
def test_any_shape_and_layout(shape: tuple[int, ...]) -> None:
    values = torch.ones(shape)
    found = sensitivity_of(values, torch.full(shape, 2.0))
    assert found.weight.sum() == 4 * values.numel()
    assert found.amax == (1.0 if values.numel() else 0.0)


def test_transposed_and_expanded_tensors_are_paired_with_their_derivatives() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    adjoint = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    straight, turned = weight_of(values, adjoint), weight_of(values.t(), adjoint.t())
    assert np.array_equal(straight, turned)
    wide = weight_of(values[:, :1].expand(2, 2), adjoint)
    assert wide[126] == 1 + 100
    assert wide[128] == 100**2 + 1000**2


def test_float32_costs_nothing_that_matters() -> None:
    values, adjoint = spread(1, -10, 10)
    sensitivity = sensitivity_of(values, adjoint)
    ratio = sensitivity.variance(FORMATS["fp32"]) / sensitivity.variance(FORMATS["bf16"])
    assert ratio == pytest.approx(4.0**-16, rel=1e-6)


def test_largest_magnitude_counts_negative_numbers() -> None:
    assert insensitive(torch.tensor([1.0, -3.0, 2.0])).amax == 3.0
    assert insensitive(torch.tensor([])).amax == 0.0
    assert insensitive(torch.tensor([1.0])).weight.sum() == 0


def test_zero_tensor_needs_no_scale() -> None:
    assert insensitive(torch.zeros(3)).scale_exponent(FORMATS["e4m3"]) == 0
    assert insensitive(torch.tensor([448.0])).scale_exponent(FORMATS["e4m3"]) == 0
    assert insensitive(torch.tensor([449.0])).scale_exponent(FORMATS["e4m3"]) == -1
    assert insensitive(torch.tensor([1e9])).scale_exponent(FORMATS["bf16"]) == 0
