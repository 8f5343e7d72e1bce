"""Bit patterns: all of them, against the implementation of another package."""

import ml_dtypes
import numpy as np
import pytest
import torch

from precision_compiler.codes import decode, encode
from precision_compiler.errors import FormatError
from precision_compiler.formats import E8M0, FORMATS, Format, round_to

ML_DTYPES: dict[str, type] = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def row(name: str) -> Format:
    return E8M0 if name == "e8m0" else FORMATS[name]


def all_codes(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Every code and the number that ml_dtypes (numpy for fp16) makes of it."""
    bits = row(name).bits
    codes = np.arange(2**bits).astype(np.uint8 if bits <= 8 else np.uint16)
    numbers = codes.view(ML_DTYPES[name]).astype(np.float32)
    return torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(numbers)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_stands_for_the_number_that_ml_dtypes_makes_of_it(name: str) -> None:
    codes, expected = all_codes(name)
    found, nan = decode(codes, row(name)), expected.isnan()
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_number_has_its_code(name: str) -> None:
    codes, numbers = all_codes(name)
    known = ~numbers.isnan()
    assert torch.equal(encode(numbers[known], row(name)), codes[known])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_nan_has_the_code_that_ml_dtypes_gives_it(name: str) -> None:
    found = int(encode(torch.tensor([torch.nan]), row(name)))
    if not row(name).has_nan:  # ml_dtypes takes the negative zero; the block's scale is NaN anyway
        assert found == 0
        return
    expected: bytes = np.array([np.nan], np.float32).astype(ML_DTYPES[name]).tobytes()
    assert found == int.from_bytes(expected, "little")


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_is_a_fixed_point_of_rounding(name: str) -> None:
    _, numbers = all_codes(name)
    for saturate in (False, True):
        given = numbers[numbers.isfinite()] if saturate else numbers[~numbers.isnan()]
        assert torch.equal(round_to(given, row(name), saturate=saturate), given)


def test_number_off_the_grid_is_refused_by_its_value() -> None:
    with pytest.raises(FormatError, match=r"^5 is not a number of e2m1: round it first$"):
        encode(torch.tensor([4.0, 5.0]), FORMATS["e2m1"])
    with pytest.raises(FormatError, match="inf is not a number of e4m3"):
        encode(torch.tensor([torch.inf]), FORMATS["e4m3"])


def test_wide_formats_have_no_codes_here() -> None:
    for call in (decode, encode):
        with pytest.raises(FormatError, match="codes of fp32 are not made here"):
            call(torch.tensor([1]), FORMATS["fp32"])
