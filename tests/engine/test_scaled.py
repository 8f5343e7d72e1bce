"""Scaled formats against a plain reference: numpy, one block at a time, casts by ml_dtypes."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch

from precision_compiler.errors import FormatError
from precision_compiler.formats import FORMATS, Format, quantised, round_to
from precision_compiler.scaled import Quantised, dequantise, quantise, rounded
from precision_compiler.scaling import (
    BLOCK_1X128,
    BLOCK_128X128,
    MX,
    MX_FLOOR,
    NVFP4,
    NVFP4_2D,
    ROW,
    SCALED_FORMATS,
    SCALINGS,
    TENSOR,
    ScaleFormat,
    Scaling,
    scaled_format_named,
)

Array = npt.NDArray[np.float32]
CASTS: dict[str, type] = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
MX_ELEMENTS = ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")
E2M1, E4M3 = FORMATS["e2m1"], FORMATS["e4m3"]


def spread(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Gaussian numbers; rows differ by up to 2^60 in size, one block of 32 is zero."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-30, 31, (rows, 1), generator=generator)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(sizes.float())
    x[0, :32] = 0.0
    return x


def cast(x: Array, fmt: Format) -> Array:
    """The nearest element, by another package, of numbers clamped before."""
    clamped = np.clip(x, -fmt.max_finite, fmt.max_finite)
    return clamped.astype(CASTS[fmt.name]).astype(np.float32)


def reference_mx(block: Array, fmt: Format, floor: bool) -> tuple[Array, float]:
    """Elements and scale of one MX block; the exponent by comparison of exact fractions."""
    amax = Fraction(float(np.abs(block).max()))
    largest, exponent = Fraction(fmt.max_finite), -127
    if floor:
        top = Fraction(2) ** int(np.floor(np.log2(fmt.max_finite)))
        while exponent < 127 and amax >= 2 * top * Fraction(2) ** exponent:
            exponent += 1
    else:
        while exponent < 127 and amax > largest * Fraction(2) ** exponent:
            exponent += 1
    return cast((block.astype(np.float64) / 2.0**exponent).astype(np.float32), fmt), 2.0**exponent


def reference_nvfp4(block: Array, amax: np.float32) -> tuple[Array, np.float32, np.float32]:
    """Elements, block scale and tensor scale, each operation in float32 in the stated order."""
    one, six, largest = np.float32(1), np.float32(6), np.finfo(np.float32).max
    encode = np.minimum(np.float32(448 * 6) / amax, largest)
    tensor = one / encode
    wanted = np.abs(block).max() * (encode * (one / six))
    scale = cast(np.array([wanted], np.float32), E4M3)[0]
    with np.errstate(divide="ignore"):
        factor = np.minimum(one / (scale * tensor), largest)
    with np.errstate(over="ignore"):
        return cast(block * factor, E2M1), scale, tensor


@pytest.mark.parametrize("name", MX_ELEMENTS)
@pytest.mark.parametrize("scaling", [MX, MX_FLOOR])
def test_mx_blocks_are_those_of_the_reference(name: str, scaling: Scaling) -> None:
    x, fmt = spread(40, 128), FORMATS[name]
    found = quantise(x, fmt, scaling)
    assert found.scales.shape == (40, 4)
    for row in range(40):
        for index, block in enumerate(x[row].numpy().reshape(4, 32)):
            elements, scale = reference_mx(block, fmt, scaling.rounding == "floor")
            assert found.scales[row, index].item() == scale
            columns = slice(32 * index, 32 * index + 32)
            np.testing.assert_array_equal(found.elements[row, columns].numpy(), elements)


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_mx_scale_rounded_up_lets_nothing_saturate(name: str) -> None:
    x, fmt = spread(400, 128, 1), FORMATS[name]
    found = quantise(x, fmt, MX)
    largest = x.reshape(-1, 4, 32).abs().amax(-1).double() / found.scales.double()
    assert bool((largest <= fmt.max_finite).all())
    filled = largest > 0
    assert bool((largest[filled] > fmt.max_finite / 2).all())  # half the scale would not do
    cut = quantise(x, fmt, MX_FLOOR)
    beyond = x.reshape(-1, 4, 32).abs().amax(-1).double() / cut.scales.double()
    assert bool((beyond > fmt.max_finite).any())


def test_mx_scale_at_the_very_border() -> None:
    border = torch.tensor(448.0)
    x = torch.zeros(3, 32)
    x[:, 0] = torch.stack([border, border.nextafter(torch.tensor(500.0)), border / 2])
    assert quantise(x, E4M3, MX).scales.tolist() == [[1.0], [2.0], [0.5]]


def test_nvfp4_blocks_are_those_of_the_reference() -> None:
    x = spread(60, 64, 2) * 1e-3
    x[1:50] = torch.randn(49, 64, generator=torch.Generator().manual_seed(3)) * 1e5
    amax = np.abs(x.numpy()).max()
    found = quantise(x, E2M1, NVFP4)
    assert found.scales.shape == (60, 4)
    assert (found.scales == 0).any()
    for row in range(60):
        for index, block in enumerate(x[row].numpy().reshape(4, 16)):
            elements, scale, tensor = reference_nvfp4(block, amax)
            assert found.tensor_scale.item() == tensor
            assert found.scales[row, index].item() == scale
            columns = slice(16 * index, 16 * index + 16)
            np.testing.assert_array_equal(found.elements[row, columns].numpy(), elements)


def test_nvfp4_scales_divide_as_float32_does() -> None:
    generator = torch.Generator().manual_seed(12)
    sizes = torch.rand(500, generator=generator) * torch.exp2(torch.arange(500) % 100 - 50.0)
    for amax in sizes:
        found = quantise(amax.reshape(1, 1), E2M1, NVFP4)
        elements, scale, tensor = reference_nvfp4(amax.reshape(1).numpy(), np.float32(amax))
        assert found.tensor_scale.item() == tensor
        assert found.scales.item() == scale
        assert found.elements.item() == elements[0]


def test_nvfp4_square_blocks_are_those_of_the_reference() -> None:
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(4))
    found = quantise(x, E2M1, NVFP4_2D)
    assert found.scales.shape == (3, 4)
    for down in range(3):
        for right in range(4):
            window = (slice(16 * down, 16 * down + 16), slice(16 * right, 16 * right + 16))
            elements, scale, _ = reference_nvfp4(x[window].numpy(), np.abs(x.numpy()).max())
            assert found.scales[down, right].item() == scale
            np.testing.assert_array_equal(found.elements[window].numpy(), elements)
    turned = quantise(x.T.contiguous(), E2M1, NVFP4_2D)
    assert torch.equal(turned.elements, found.elements.T)  # why weights have square blocks


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e4m3fnuz"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "1x128", "128x128"])
@pytest.mark.parametrize("scale", ["power_of_two", "fp32"])
def test_fp8_scalings_are_those_of_the_reference(name: str, granularity: str, scale: str) -> None:
    fmt = FORMATS[name]
    scaling = SCALINGS[granularity + ("_fp32" if scale == "fp32" else "")]
    x = spread(256, 256, 5)
    windows: dict[str, tuple[int, int]] = {
        "tensor": (256, 256),
        "row": (1, 256),
        "1x128": (1, 128),
        "128x128": (128, 128),
    }
    height, width = windows[granularity]
    found = quantise(x, fmt, scaling)
    assert found.scales.shape == (256 // height, 256 // width)
    for down in range(0, 256, height):
        for right in range(0, 256, width):
            window = (slice(down, down + height), slice(right, right + width))
            part = x[window].numpy()
            amax = np.abs(part).max()
            encode = np.float32(fmt.max_finite) / amax if amax > 0 else np.float32(1)
            if scale == "power_of_two":
                encode = np.exp2(np.floor(np.log2(np.float64(encode)))).astype(np.float32)
            assert found.scales[down // height, right // width].item() == np.float32(1) / encode
            np.testing.assert_array_equal(found.elements[window].numpy(), cast(part * encode, fmt))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_a_tensor_scale_of_a_power_of_two_is_what_plans_have_always_used(name: str) -> None:
    for exponent in (-100, -61, -3, 0, 17, 60, 100, 126):
        for seed in range(20):
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(33, 7, generator=generator).clamp(-1.9, 1.9) * 2.0**exponent
            expected = quantised(x, FORMATS[name])
            found = rounded(x, FORMATS[name], TENSOR)
            assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


ANY = sorted(SCALINGS)
SHAPES = [(3, 5), (64, 96), (2, 3, 40), (130, 129), (1, 1), (16, 16)]


@pytest.mark.parametrize("scaling", ANY)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [-1, -2])
def test_rounding_in_one_go_is_storing_and_reading(
    scaling: str, shape: tuple[int, ...], axis: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6)) * 3
    for name in ("e4m3", "e2m1", "e5m2fnuz"):
        stored = quantise(x, FORMATS[name], SCALINGS[scaling], axis)
        found = rounded(x, FORMATS[name], SCALINGS[scaling], axis)
        assert found.shape == stored.elements.shape == x.shape
        assert torch.equal(found.view(torch.int32), dequantise(stored).view(torch.int32))
        assert torch.equal(round_to(stored.elements, FORMATS[name]), stored.elements)


@pytest.mark.parametrize("scaling", [MX, NVFP4, ROW, BLOCK_1X128])
def test_an_axis_is_the_last_one_of_the_transposed_tensor(scaling: Scaling) -> None:
    x = torch.randn(6, 160, 10, generator=torch.Generator().manual_seed(7))
    along = rounded(x, E2M1, scaling, axis=1)
    last = rounded(x.transpose(1, 2).contiguous(), E2M1, scaling)
    assert torch.equal(along, last.transpose(1, 2))
    assert torch.equal(rounded(x.transpose(1, 2), E2M1, scaling), last)  # whatever the strides


@pytest.mark.parametrize(
    ("scaling", "length"), [(MX, 50), (NVFP4, 50), (BLOCK_1X128, 200), (MX, 7)]
)
def test_a_last_short_block_is_one_filled_up_with_zeros(scaling: Scaling, length: int) -> None:
    x = torch.randn(9, length, generator=torch.Generator().manual_seed(8))
    filled = torch.nn.functional.pad(x, (0, -length % scaling.size))
    found, whole = quantise(x, E4M3, scaling), quantise(filled, E4M3, scaling)
    assert torch.equal(found.scales, whole.scales)
    assert torch.equal(found.elements, whole.elements[:, :length])


def test_square_blocks_that_do_not_fit_are_filled_up_with_zeros() -> None:
    x = torch.randn(2, 100, 150, generator=torch.Generator().manual_seed(9))
    filled = torch.nn.functional.pad(x, (0, 106, 0, 28))
    found, whole = quantise(x, E4M3, BLOCK_128X128), quantise(filled, E4M3, BLOCK_128X128)
    assert found.scales.shape == (2, 1, 2)
    assert torch.equal(found.scales, whole.scales)
    assert torch.equal(found.elements, whole.elements[:, :100, :150])


@pytest.mark.parametrize("scaling", ANY)
def test_zeros_stay_zeros_with_their_signs(scaling: str) -> None:
    x = torch.zeros(128, 128)
    x[:, ::2] = -0.0
    found = rounded(x, E2M1, SCALINGS[scaling])
    assert torch.equal(found.view(torch.int32), x.view(torch.int32))
    assert not rounded(x, FORMATS["e4m3fnuz"], SCALINGS[scaling]).signbit().any()


def stored_with(value: float, scaling: Scaling, fmt: Format = E4M3) -> Quantised:
    """Two blocks of 32 (or one tensor) of ones, the first of them with a value in front."""
    x = torch.ones(1, 64)
    x[0, 0] = value
    return quantise(x, fmt, scaling)


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_a_nan_makes_its_mx_block_nan(name: str) -> None:
    stored = stored_with(torch.nan, MX, FORMATS[name])
    assert stored.scales.isnan().tolist() == [[True, False]]
    found = dequantise(stored)
    assert bool(found[0, :32].isnan().all())
    assert found[0, 32:].tolist() == [1.0] * 32


@pytest.mark.parametrize("name", MX_ELEMENTS)
@pytest.mark.parametrize("sign", [1, -1])
def test_an_infinity_stays_one_in_its_mx_block_and_takes_the_largest_scale(
    name: str, sign: int
) -> None:
    stored = stored_with(sign * torch.inf, MX, FORMATS[name])
    assert stored.scales[0, 0].item() == 2.0**127
    assert stored.elements[0, 0].item() == sign * FORMATS[name].max_finite
    found = dequantise(stored)
    assert found[0, 0].item() == sign * torch.inf
    assert found[0, 1:].tolist() == [0.0] * 31 + [1.0] * 32
    floor = stored_with(sign * torch.inf, MX_FLOOR, FORMATS[name])
    assert dequantise(floor)[0, 0].item() == sign * torch.inf


def test_a_nan_makes_a_whole_nvfp4_tensor_nan_and_an_infinity_saturates() -> None:
    assert bool(dequantise(stored_with(torch.nan, NVFP4, E2M1)).isnan().all())
    stored = stored_with(torch.inf, NVFP4, E2M1)
    assert stored.tensor_scale.item() == 1.0
    assert stored.scales[0, 0].item() == 448.0
    assert dequantise(stored)[0, 0].item() == 6 * 448


@pytest.mark.parametrize("scaling", [TENSOR, ROW, BLOCK_1X128, BLOCK_128X128])
@pytest.mark.parametrize("scale", ["power_of_two", "fp32"])
def test_scales_of_one_where_the_largest_magnitude_is_no_number(
    scaling: Scaling, scale: ScaleFormat
) -> None:
    scaling = replace(scaling, scale=scale)
    infinite = stored_with(torch.inf, scaling)
    assert infinite.scales[0, 0].item() == 1.0
    assert dequantise(infinite)[0, :2].tolist() == [448.0, 1.0]
    undefined = dequantise(stored_with(torch.nan, scaling))
    assert undefined.isnan()[0, :2].tolist() == [True, False]
    assert quantise(torch.zeros(1, 4), E4M3, scaling).scales.tolist() == [[1.0]]


@pytest.mark.parametrize("name", MX_ELEMENTS)
def test_mx_scales_reach_from_the_smallest_to_the_largest_power(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.zeros(4, 32)
    x[:, 0] = torch.tensor([2.0**-149, 2.0**-127, 2.0**-126, FORMATS["fp32"].max_finite])
    stored = quantise(x, fmt, MX)
    assert stored.scales[:3].flatten().tolist() == [2.0**-127] * 3
    assert stored.scales[3].item() == 2.0 ** (127 - int(np.log2(fmt.max_finite)) + 1)
    found = dequantise(stored)
    smallest = fmt.smallest_subnormal * 2.0**-127  # 2^-149 is below half of it, so it vanishes
    assert found[:3, 0].tolist() == [0.0 if smallest > 2.0**-149 else 2.0**-149, *x[1:3, 0]]


def test_numbers_next_to_the_largest_float32_number_may_round_to_infinity() -> None:
    x = torch.tensor([[FORMATS["fp32"].max_finite] * 2])
    assert rounded(x, E4M3, MX).tolist() == [[torch.inf, torch.inf]]


def test_empty_tensors_and_single_numbers() -> None:
    for name in ANY:
        empty = torch.zeros(0, 8)
        assert rounded(empty, E4M3, SCALINGS[name]).shape == (0, 8)
        assert dequantise(quantise(empty, E4M3, SCALINGS[name])).shape == (0, 8)
    for scaling in (TENSOR, SCALINGS["none"], SCALINGS["tensor_fp32"]):
        single = torch.tensor(3.0)
        assert rounded(single, E4M3, scaling).shape == ()


@pytest.mark.parametrize("scaling", ANY)
def test_results_are_laid_out_as_those_of_any_operation(scaling: str) -> None:
    x = torch.randn(40, 130, 6, generator=torch.Generator().manual_seed(13))
    for given in (x, x.transpose(0, 2), x.transpose(1, 2), x[:, ::2], x.expand(2, 40, 130, 6)):
        for axis in (-1, -2):
            found = rounded(given, E4M3, SCALINGS[scaling], axis)
            assert found.stride() == torch.empty_like(given).stride()
            assert torch.equal(found, rounded(given.contiguous(), E4M3, SCALINGS[scaling], axis))


def test_the_given_tensor_is_left_alone() -> None:
    for name in ANY:
        x = torch.randn(32, 32, generator=torch.Generator().manual_seed(10))
        before = x.clone()
        rounded(x, E4M3, SCALINGS[name])
        assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Scaling("block"), "block scaling needs the size of a block"),
        (lambda: Scaling("row", size=8), "row scaling has no blocks"),
        (lambda: Scaling("tensor", "fp32", rounding="floor"), "fp32 scales are not rounded"),
        (lambda: rounded(torch.ones(3).double(), E4M3, MX), "not torch.float64"),
        (lambda: rounded(torch.ones(3), E4M3, MX, axis=1), r"axis 1 is none of .* \(3,\)"),
        (lambda: rounded(torch.ones(3), E4M3, NVFP4_2D), "last two dimensions"),
        (lambda: rounded(torch.ones(3, 3, 3), E4M3, NVFP4_2D, 0), "not along axis 0"),
        (lambda: scaled_format_named("mxfp5"), "unknown format 'mxfp5': choose one of fp32"),
    ],
)
def test_mistakes_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()


def test_block_formats_count_the_bits_of_their_scales() -> None:
    bits = {name: row.bits for name, row in SCALED_FORMATS.items()}
    assert bits == {
        "mxfp8": 8.25,
        "mxfp8e5m2": 8.25,
        "mxfp6": 6.25,
        "mxfp6e3m2": 6.25,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "e4m3_row": 8.0,
        "e4m3_1x128": 8.25,
        **dict.fromkeys(("nvfp4_2d", "nvfp4_sr", "nvfp4_rht"), 4.5),
        **dict.fromkeys(("mxfp4_sr", "mxfp4_rht"), 4.25),
    }
    assert NVFP4_2D.bits == 8 / 256
    assert SCALED_FORMATS["nvfp4"].bytes == 4.5 / 8


def test_element_formats_have_the_scaling_that_plans_give_them() -> None:
    assert scaled_format_named("e4m3").scaling == TENSOR
    assert scaled_format_named("bf16").scaling == SCALINGS["none"]
    assert scaled_format_named("nvfp4") is SCALED_FORMATS["nvfp4"]
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(11)) * 100
    for name, fmt in FORMATS.items():
        row = scaled_format_named(name)
        assert torch.equal(rounded(x, row.element, row.scaling), quantised(x, fmt))
