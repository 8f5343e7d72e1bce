"""Histograms and measured errors against the sums over elements they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precision_compiler.formats import FORMATS, Format, round_to, ulp
from precision_compiler.observation import Observation, sensitivity_of, update_loss
from precision_compiler.statistics import METRICS, Sensitivity

SMALLEST = 2.0**-126
BF16 = FORMATS["bf16"]


def spread(seed: int, low: int = -140, high: int = 127, count: int = 3000) -> tuple[Tensor, Tensor]:
    """Values over many binades, zeros and subnormals included, and derivatives."""
    dice = np.random.default_rng(seed)
    exponents = dice.integers(low, high, count)
    values = np.exp2(exponents.astype(np.float64)) * dice.uniform(1, 2, count)
    values *= dice.choice([-1, 1, 0], count, p=[0.45, 0.45, 0.1])
    adjoint = dice.normal(size=count) * np.exp2(dice.integers(-10, 10, count))
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


def real_errors(values: Tensor, fmt: Format) -> Tensor:
    """``Q(y) - y`` in float64: scaled formats under the largest power of two that fits."""
    scale = 1.0
    if fmt.scaled:
        top = values.double().abs().max().item()
        scale = 2.0 ** max(k for k in range(-140, 141) if top * 2.0**k <= fmt.max_finite)
    wide = values.double() * scale
    return (round_to(wide, fmt) - wide) / scale


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


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_measured_variance_is_that_of_the_real_errors(name: str, size: float) -> None:
    values, adjoint = spread(1, -12, 3)
    values = (values.double() * size).float()
    moved = adjoint.double() * real_errors(values, FORMATS[name])
    sensitivity = sensitivity_of(values, adjoint, [name])
    measured = sensitivity.measured[name]
    assert measured.variance == pytest.approx(float(moved.square().sum()), rel=1e-5)
    assert measured.signed == pytest.approx(float(moved.sum()) ** 2, rel=1e-3)
    for metric in range(len(METRICS)):
        found = sensitivity.variance(FORMATS[name], metric=metric)
        assert found == pytest.approx(measured.variance)


def test_single_number_has_the_error_it_has_and_two_have_the_mean() -> None:
    one = sensitivity_of(torch.tensor(1.001), torch.tensor(2.0), ["bf16"])
    assert one.variance(BF16) == pytest.approx((2 * 0.001) ** 2, rel=1e-3)
    two = sensitivity_of(torch.tensor([1.001, 1.001]), torch.tensor([2.0, 2.0]), ["bf16"])
    assert two.variance(BF16) == pytest.approx(2 * 4 * 2.0**-14 / 12)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(-100, 90), st.integers(-10, 10))
def test_drift_is_the_relative_error_of_shifted_values(exponent: int, drift: int) -> None:
    value = torch.tensor([2.0**exponent])
    moved = torch.tensor([2.0 ** (exponent + drift)])
    adjoint = torch.ones(1)
    here = sensitivity_of(value, adjoint).variance(BF16, drift)
    there = sensitivity_of(moved, adjoint).variance(BF16)
    assert here / value.item() ** 2 == pytest.approx(there / moved.item() ** 2)


def test_weight_holds_every_square_in_its_binade() -> None:
    values = torch.tensor([0.0, -0.0, 1e-40, SMALLEST, 1.0, -1.5, 1.9999, 2.0, 3e38])
    found = sensitivity_of(values, torch.arange(1.0, 10.0))
    expected = np.zeros(255)
    expected[0] = 16  # 2^-126
    expected[126] = 25 + 36 + 49  # 2^0
    expected[127] = 64
    expected[253] = 81  # 2^127
    assert np.array_equal(found.weight, [expected] * len(METRICS))
    assert found.count.sum() == 6
    assert found.count[126] == 3
    assert found.size == 9


def test_every_metric_has_a_row_of_its_own() -> None:
    weight = np.zeros((3, 255))
    weight[:, 126] = [1.0, 4.0, 0.0]
    found = Sensitivity(weight, 1.0)
    ratio = [found.variance(BF16, metric=metric) for metric in range(3)]
    assert ratio == pytest.approx([2.0**-14 / 12, 4 * 2.0**-14 / 12, 0.0])
    assert not found.is_silent
    assert Sensitivity(np.zeros((3, 255)), 1.0).is_silent


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
def test_any_shape_and_layout(shape: tuple[int, ...]) -> None:
    values = torch.ones(shape)
    found = sensitivity_of(values, torch.full(shape, 2.0))
    assert found.weight[0].sum() == 4 * values.numel()
    assert found.amax == (1.0 if values.numel() else 0.0)


def test_transposed_and_expanded_tensors_are_paired_with_their_derivatives() -> None:
    values = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    adjoint = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    straight, turned = sensitivity_of(values, adjoint), sensitivity_of(values.t(), adjoint.t())
    assert np.array_equal(straight.weight, turned.weight)
    wide = sensitivity_of(values[:, :1].expand(2, 2), adjoint).weight[0]
    assert wide[126] == 1 + 100
    assert wide[128] == 100**2 + 1000**2


def test_float32_costs_nothing_that_matters() -> None:
    sensitivity = sensitivity_of(*spread(1, -10, 10))
    ratio = sensitivity.variance(FORMATS["fp32"]) / sensitivity.variance(BF16)
    assert ratio == pytest.approx(4.0**-16, rel=1e-6)


def test_zero_tensor_needs_no_scale() -> None:
    assert Observation(torch.zeros(3)).insensitive.scale_exponent(FORMATS["e4m3"]) == 0
    assert Observation(torch.tensor([448.0])).insensitive.scale_exponent(FORMATS["e4m3"]) == 0
    assert Observation(torch.tensor([449.0])).insensitive.scale_exponent(FORMATS["e4m3"]) == -1
    assert Observation(torch.tensor([1e9])).insensitive.scale_exponent(BF16) == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.sampled_from(["bf16", "fp16", "e4m3", "e5m2"]), st.integers(0, 99), st.booleans())
def test_flushed_share_is_counted_but_for_powers_of_two_that_are_half_the_smallest_number(
    name: str, seed: int, powers: bool
) -> None:
    """In the binade above half of the smallest number all round up, its first number down."""
    fmt, (values, _) = FORMATS[name], spread(seed, -40, 4, 500)
    if powers:
        values = values.sign() * torch.exp2(torch.frexp(values)[1].float())
    values = values[values != 0.0]
    zero = float((values.double() + real_errors(values, fmt) == 0.0).double().mean())
    seen = Observation(values).insensitive
    binade = fmt.min_exponent - fmt.precision - seen.scale_exponent(fmt)
    ties = float((values.abs() == 2.0**binade).double().mean())
    assert zero - seen.flushed(fmt) == pytest.approx(ties, abs=1e-12)
    assert powers or ties == 0.0


def updated(weights: Tensor, step: float) -> float:
    """Share of bf16 weights that stay where they are under updates of random sign."""
    signs = torch.randint(0, 2, weights.shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    moved = round_to(weights.double() + step * signs, BF16)
    return float((moved == weights.double()).double().mean())


@pytest.mark.parametrize("step", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("deviation", [0.02, 0.3])
def test_update_loss_is_the_share_of_weights_that_adam_leaves_in_place(
    step: float, deviation: float
) -> None:
    weights = (
        (torch.randn(9000, generator=torch.Generator().manual_seed(0)) * deviation)
        .bfloat16()
        .float()
    )
    powers = float((torch.frexp(weights.abs())[0] == 0.5).double().mean())  # closer from below
    found = update_loss([weights[:2000], weights[2000:]], step, BF16)
    assert found == pytest.approx(updated(weights, step), abs=powers)
    between = weights[torch.frexp(weights.abs())[0] != 0.5]
    assert update_loss([between], step, BF16) == pytest.approx(updated(between, step), abs=1e-12)
    half = ulp(weights, BF16) / 2
    assert found == pytest.approx(float((step < half).double().mean()), abs=1e-12)
