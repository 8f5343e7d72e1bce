"""What holds for every format and every number."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_compiler.formats import FORMATS, round_to
from precision_compiler.scaled import rounded
from precision_compiler.scaling import MX, MX_FLOOR, NVFP4, SCALINGS

names = st.sampled_from(list(FORMATS))
scaled_names = st.sampled_from([name for name, fmt in FORMATS.items() if fmt.scaled])
floats = st.floats(width=32, allow_nan=False)
lists = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=80)
scalings = st.sampled_from(sorted(SCALINGS))


@settings(deadline=None, derandomize=True)
@given(names, st.lists(st.floats(width=32), min_size=1), st.booleans())
def test_rounding_twice_is_rounding_once(name: str, numbers: list[float], saturate: bool) -> None:
    once = round_to(torch.tensor(numbers), FORMATS[name], saturate=saturate)
    assert torch.equal(
        round_to(once, FORMATS[name], saturate=saturate).nan_to_num(7), once.nan_to_num(7)
    )


@settings(deadline=None, derandomize=True)
@given(names, floats, floats)
def test_order_is_kept(name: str, one: float, other: float) -> None:
    low, high = round_to(torch.tensor(sorted((one, other))), FORMATS[name], saturate=True)
    assert low <= high


@settings(deadline=None, derandomize=True)
@given(names, st.lists(floats, min_size=1), st.booleans())
def test_the_sign_makes_no_difference(name: str, numbers: list[float], saturate: bool) -> None:
    x = torch.tensor(numbers)
    found = round_to(-x, FORMATS[name], saturate=saturate)
    expected = -round_to(x, FORMATS[name], saturate=saturate)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))


@settings(deadline=None, derandomize=True)
@given(names, st.lists(floats, min_size=1), st.booleans())
def test_float32_and_float64_round_alike(name: str, numbers: list[float], saturate: bool) -> None:
    x = torch.tensor(numbers)
    found = round_to(x, FORMATS[name], saturate=saturate)
    wide = round_to(x.double(), FORMATS[name], saturate=saturate).float()
    assert torch.equal(found.nan_to_num(7), wide.nan_to_num(7))


@settings(deadline=None, derandomize=True)
@given(scaled_names, lists, st.integers(-40, 40), scalings.filter(lambda s: "fp32" not in s))
def test_a_power_of_two_scales_what_comes_out(
    name: str, numbers: list[float], power: int, scaling: str
) -> None:
    row = SCALINGS[scaling]
    if row.granularity in ("none", "block2d"):
        row = MX
    x = torch.tensor(numbers)
    x = torch.where(x.abs() < 1e-6, 0, x)
    factor = 2.0**power
    found = rounded(x * factor, FORMATS[name], row)
    assert torch.equal(found, rounded(x, FORMATS[name], row) * factor)


@settings(deadline=None, derandomize=True)
@given(scaled_names, lists, st.sampled_from([MX_FLOOR, MX, NVFP4]))
def test_scaled_rounding_is_symmetric(name: str, numbers: list[float], row: object) -> None:
    assert isinstance(row, type(MX))
    x = torch.tensor(numbers)
    assert torch.equal(rounded(-x, FORMATS[name], row), -rounded(x, FORMATS[name], row))


@settings(deadline=None, derandomize=True)
@given(scaled_names, lists, st.sampled_from(["mx", "tensor", "row", "1x128"]))
def test_scaled_rounding_twice_is_rounding_once(
    name: str, numbers: list[float], scaling: str
) -> None:
    once = rounded(torch.tensor(numbers), FORMATS[name], SCALINGS[scaling])
    assert torch.equal(rounded(once, FORMATS[name], SCALINGS[scaling]), once)
