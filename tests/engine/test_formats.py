"""Rounding: exhaustively where a format is small, against other implementations where it is not."""

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from precision_compiler.codes import decode
from precision_compiler.errors import FormatError
from precision_compiler.formats import (
    E8M0,
    FORMATS,
    Format,
    format_named,
    format_of_dtype,
    round_to,
    rounding_variance,
    ulp,
)

ML_DTYPES: dict[str, type] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
STORED = tuple(ML_DTYPES)
NARROW = ("tf32", *STORED)


def numbers_of(fmt: Format) -> torch.Tensor:
    """Every code of a stored format of up to 16 bits, as float32."""
    return decode(torch.arange(2**fmt.bits), fmt)


def finite_grid(fmt: Format) -> torch.Tensor:
    """The finite numbers of a stored format in increasing order, without a second zero."""
    numbers = numbers_of(fmt)
    return torch.from_numpy(np.unique(numbers[numbers.isfinite()].double().numpy()))


def floats_of_every_exponent(count: int, seed: int = 0) -> torch.Tensor:
    """Random bit patterns: every exponent alike, subnormals, infinities and NaN included."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def floats_around(fmt: Format, count: int, seed: int = 1) -> torch.Tensor:
    """Random floats in the exponents that the format has, two binades more on either side."""
    generator = torch.Generator().manual_seed(seed)
    low = max(fmt.min_exponent - fmt.precision - 1, -126)
    high = min(int(np.log2(fmt.max_finite)) + 2, 127)
    exponent = torch.randint(low, high + 1, (count,), generator=generator)
    mantissa = torch.rand(count, generator=generator, dtype=torch.float64) + 1
    sign = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    exact = (sign * mantissa).numpy() * np.exp2(exponent.numpy().astype(np.float64))
    return torch.from_numpy(exact).float()


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit; a NaN equals a NaN of any payload."""
    assert found.dtype == expected.dtype == torch.float32
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("name", STORED)
def test_every_code_is_a_fixed_point(name: str) -> None:
    numbers = numbers_of(FORMATS[name])
    same_bits(round_to(numbers, FORMATS[name]), numbers)


@pytest.mark.parametrize("name", STORED)
def test_table_agrees_with_the_codes(name: str) -> None:
    fmt, grid = FORMATS[name], finite_grid(FORMATS[name])
    positive = grid[grid > 0]
    assert bool(numbers_of(fmt).isnan().any()) == fmt.has_nan
    assert bool((numbers_of(fmt).signbit() & (numbers_of(fmt) == 0)).any()) == fmt.has_negative_zero
    assert positive.max().item() == fmt.max_finite
    assert positive.min().item() == fmt.smallest_subnormal
    assert bool(numbers_of(fmt).isinf().any()) == fmt.has_infinity
    # The spacing above the smallest normal number, and the precision that makes of it.
    normal = positive[positive >= 2.0**fmt.min_exponent]
    assert (normal[1] - normal[0]).item() == 2.0 ** (fmt.min_exponent - fmt.precision + 1)


@pytest.mark.parametrize("name", STORED)
def test_spacing_is_the_distance_to_the_next_number(name: str) -> None:
    grid = finite_grid(FORMATS[name])
    positive = grid[grid >= 0]
    assert torch.equal(ulp(positive[:-1], FORMATS[name]), positive[1:] - positive[:-1])


@pytest.mark.parametrize("name", STORED)
def test_midpoint_goes_to_the_even_neighbour(name: str) -> None:
    fmt = FORMATS[name]
    grid = finite_grid(fmt)
    low, high = grid[:-1], grid[1:]
    middle = (low + high) / 2
    units = ulp(torch.where(high > 0, low, high), fmt)  # the spacing within which both lie
    even = torch.where((low / units) % 2 == 0, low, high)
    found = round_to(middle, fmt)
    assert torch.equal(found, even)
    outward = torch.nextafter(middle, high)
    assert torch.equal(round_to(outward, fmt), high)
    inward = torch.nextafter(middle, low)
    assert torch.equal(round_to(inward, fmt), low)


@pytest.mark.parametrize("name", STORED)
def test_a_million_floats_round_as_ml_dtypes_rounds_them(name: str) -> None:
    fmt = FORMATS[name]
    values = torch.cat([floats_of_every_exponent(600_000), floats_around(fmt, 400_000)])
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.numpy().astype(ML_DTYPES[name]).astype(np.float32)
    expected = torch.from_numpy(cast)
    if not fmt.has_infinity:
        assert not expected.isinf().any()
    if not fmt.has_nan:  # ml_dtypes makes a zero of it, this package keeps it in sight
        expected[values.isnan()] = torch.nan
    same_bits(round_to(values, fmt), expected)


@pytest.mark.parametrize("name", STORED)
def test_a_million_floats_saturate_as_ml_dtypes_rounds_clamped_ones(name: str) -> None:
    fmt = FORMATS[name]
    values = torch.cat([floats_of_every_exponent(600_000, 8), floats_around(fmt, 400_000, 9)])
    clamped = np.clip(values.numpy(), -fmt.max_finite, fmt.max_finite)
    with np.errstate(invalid="ignore"):
        expected = torch.from_numpy(clamped.astype(ML_DTYPES[name]).astype(np.float32))
    expected[values.isnan()] = torch.nan
    same_bits(round_to(values, fmt, saturate=True), expected)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("source", ["bf16", "fp16"])
def test_every_16_bit_number_rounds_as_ml_dtypes_rounds_it(name: str, source: str) -> None:
    fmt, values = FORMATS[name], numbers_of(FORMATS[source])
    assert len(values) == 65_536
    for saturate in (False, True):
        given = values.clamp(-fmt.max_finite, fmt.max_finite) if saturate else values
        with np.errstate(over="ignore", invalid="ignore"):
            expected = given.numpy().astype(ML_DTYPES[name]).astype(np.float32)
        expected[values.isnan().numpy()] = np.nan
        same_bits(round_to(values, fmt, saturate=saturate), torch.from_numpy(expected))


def test_scales_round_as_ml_dtypes_rounds_them() -> None:
    values = torch.cat(
        [floats_of_every_exponent(500_000, 10), floats_around(E8M0, 499_000, 11)]
        + [numbers_of(FORMATS[name]) for name in ("bf16", "fp16")]
    )
    with np.errstate(over="ignore", invalid="ignore"):
        expected = values.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    # In this half of the lowest binade, whose float32 numbers are subnormal, ml_dtypes (and torch)
    # take the farther neighbour.
    differs = (values > 2.0**-127) & (values < 1.5 * 2.0**-127)
    found = round_to(values, E8M0)
    assert differs.sum() > 100
    assert set(found[differs].tolist()) == {2.0**-127}
    assert np.unique(expected[differs.numpy()]).tolist() == [2.0**-126]
    same_bits(found[~differs], torch.from_numpy(expected)[~differs])


def test_scales_know_no_zero_no_sign_and_no_infinity() -> None:
    largest, smallest = 2.0**127, 2.0**-127
    values = torch.tensor([0.0, -0.0, -1.0, torch.nan, -torch.inf, torch.inf, 3.0, 2.999, 5.9])
    found = round_to(values, E8M0)
    assert found.isnan().tolist() == [True] * 6 + [False] * 3
    assert found[6:].tolist() == [4.0, 2.0, 4.0]
    huge = torch.tensor([torch.inf, 1.5 * largest, 1.4999 * largest], dtype=torch.float64)
    assert round_to(huge, E8M0).isnan().tolist() == [True, True, False]
    assert round_to(huge, E8M0, saturate=True).tolist() == [largest] * 3
    tiny = torch.tensor([2.0**-149, 2.0**-128, smallest, 1.4 * smallest, 1.5 * smallest])
    assert round_to(tiny, E8M0).tolist() == [smallest] * 4 + [2 * smallest]


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_million_floats_round_as_torch_casts_them(name: str) -> None:
    fmt = FORMATS[name]
    assert fmt.dtype is not None
    values = torch.cat([floats_of_every_exponent(600_000, 2), floats_around(fmt, 400_000, 3)])
    same_bits(round_to(values, fmt), values.to(fmt.dtype).float())


def test_a_million_floats_round_to_tf32_as_integer_arithmetic_does() -> None:
    values = torch.cat([floats_of_every_exponent(600_000, 4), floats_around(FORMATS["tf32"], 9999)])
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    # Add half of the lowest kept bit, a little less where that bit is even, and cut.
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) >> 13 << 13).astype(np.uint32)
    expected = torch.from_numpy(rounded.view(np.float32).copy())
    expected[values.isnan()] = torch.nan
    same_bits(round_to(values, FORMATS["tf32"]), expected)


def test_float32_is_left_alone() -> None:
    values = floats_of_every_exponent(100_000, 5)
    same_bits(round_to(values, FORMATS["fp32"]), values)


@pytest.mark.parametrize("name", FORMATS)
def test_doubles_far_outside_the_range_overflow_or_vanish(name: str) -> None:
    fmt = FORMATS[name]
    huge = torch.tensor([1e300, -1e300], dtype=torch.float64)
    beyond = beyond_the_last(fmt)
    expected = torch.tensor([beyond, -beyond], dtype=torch.float64)
    assert torch.equal(round_to(huge, fmt).nan_to_num(7.0), expected.nan_to_num(7.0))
    limits = torch.tensor([fmt.max_finite, -fmt.max_finite], dtype=torch.float64)
    assert torch.equal(round_to(huge, fmt, saturate=True), limits)
    tiny = torch.tensor([1e-300, -1e-300], dtype=torch.float64)
    found = round_to(tiny, fmt)
    assert torch.equal(found, torch.zeros(2, dtype=torch.float64))
    assert found.signbit().tolist() == [False, fmt.has_negative_zero]


def beyond_the_last(fmt: Format) -> float:
    """What a positive number becomes that rounds beyond the largest finite one."""
    if fmt.has_infinity:
        return torch.inf
    return torch.nan if fmt.has_nan else fmt.max_finite


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_keeps_its_sign_and_nan_stays(name: str, dtype: torch.dtype) -> None:
    values = torch.tensor([0.0, -0.0, torch.nan, -1e-46, 1e-46], dtype=dtype)
    for saturate in (False, True):
        found = round_to(values, FORMATS[name], saturate=saturate)
        assert found.dtype == dtype
        assert found.isnan().tolist() == [False, False, True, False, False]
        assert found[[0, 1, 3, 4]].tolist() == [0.0] * 4
        signs = FORMATS[name].has_negative_zero
        assert found[[0, 1, 3, 4]].signbit().tolist() == [False, signs, signs, False]


@pytest.mark.parametrize("name", FORMATS)
def test_beyond_the_range(name: str) -> None:
    fmt = FORMATS[name]
    last = fmt.max_finite
    step = ulp(torch.tensor(last, dtype=torch.float64), fmt).item()
    inside, outside = last + step / 2 * (1 - 2.0**-20), last + step / 2 * (1 + 2.0**-20)
    values = torch.tensor([inside, outside, torch.inf], dtype=torch.float64)
    values = torch.cat([values, -values])
    found = round_to(values, fmt)
    beyond = beyond_the_last(fmt)
    for sign, part in ((1, found[:3]), (-1, found[3:])):
        assert part[0].item() == sign * last
        for value in part[1:].tolist():
            assert value == sign * beyond or (np.isnan(value) and np.isnan(beyond))
    kept = round_to(values, fmt, saturate=True)
    assert kept.tolist() == [last] * 3 + [-last] * 3


@pytest.mark.parametrize("name", NARROW)
def test_predicted_error_is_the_measured_one_in_every_binade(name: str) -> None:
    fmt = FORMATS[name]
    generator = torch.Generator().manual_seed(6)
    top = int(np.log2(fmt.max_finite))
    low = fmt.min_exponent - fmt.precision - 4
    exponents = np.unique(np.concatenate([np.arange(low, low + 24), np.arange(top - 4, top)]))
    exponents = exponents[exponents < top]
    fractions = 1 + torch.rand(30_000, generator=generator, dtype=torch.float64)
    measured = np.array([_mean_square(fractions, int(e), fmt) for e in exponents])
    np.testing.assert_allclose(rounding_variance(exponents, fmt), measured, rtol=0.04)


def _mean_square(fractions: torch.Tensor, exponent: int, fmt: Format) -> float:
    values = fractions * 2.0**exponent
    return float((round_to(values, fmt) - values).square().mean())


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("scale", [-9, 0, 12])
def test_predicted_error_of_scaled_numbers_is_measured_at_their_own_scale(
    name: str, scale: int
) -> None:
    fmt = FORMATS[name]
    exponents = np.arange(fmt.min_exponent - 6, 5) - scale
    fractions = 1 + torch.rand(30_000, generator=torch.Generator().manual_seed(7)).double()
    found: list[float] = []
    for exponent in exponents:
        values = fractions * 2.0 ** int(exponent)
        back = round_to(values * 2.0**scale, fmt) / 2.0**scale
        found.append(float((back - values).square().mean()))
    expected: npt.NDArray[np.float64] = rounding_variance(exponents, fmt, scale)
    np.testing.assert_allclose(expected, np.array(found), rtol=0.04)


def test_refinement_compares_significant_bits_alone() -> None:
    assert FORMATS["tf32"].refines(FORMATS["fp16"])
    assert FORMATS["fp16"].refines(FORMATS["tf32"])
    assert FORMATS["fp16"].refines(FORMATS["bf16"])
    assert not FORMATS["bf16"].refines(FORMATS["fp16"])


def test_formats_are_found_by_name_and_dtype() -> None:
    for name, fmt in FORMATS.items():
        assert format_named(name) is fmt
        if fmt.dtype is not None:
            assert format_of_dtype(fmt.dtype) is fmt
    assert format_of_dtype(torch.int64) is None


def test_unknown_format_is_named_with_those_there_are() -> None:
    with pytest.raises(
        FormatError, match=r"unknown format 'fp7': choose one of fp32, tf32"
    ) as seen:
        format_named("fp7")
    assert "\n" not in str(seen.value)
