"""Operands as GPUs take them: the quantiser's numbers, codes and scales in their places."""

import pytest
import torch
from torch import Tensor

from precision_compiler.codes import encode
from precision_compiler.elements import E8M0, FORMATS
from precision_compiler.formats import choice_named, quantised
from precision_compiler.kernels.block_gemm import pack
from precision_compiler.packing import (
    block_bytes,
    block_operand,
    in_blocks,
    packed_pairs,
    tensor_operand,
    tensor_scale,
)
from precision_compiler.scaled import quantise
from precision_compiler.scaling import SCALED_FORMATS
from tests.lowered_run import in_rows, numbers

EIGHT_BITS = ("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz")
BLOCKS = ("mxfp8", "mxfp4", "nvfp4")


def spread(rows: int, columns: int) -> Tensor:
    """Numbers of many magnitudes, with zeros, a row of zeros and one outlier."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator)
    x = x * torch.logspace(-4, 2, columns)
    x[:, 1], x[1], x[0, 0] = 0.0, 0.0, 300.0
    return x


@pytest.mark.parametrize("name", EIGHT_BITS)
@pytest.mark.parametrize("right", [False, True])
def test_tensor_operand_holds_the_emulated_numbers(name: str, right: bool) -> None:
    x = spread(21, 37)
    scale = tensor_scale(x, name)
    made = tensor_operand(x, scale.encode, name, right)
    assert made.dtype == FORMATS[name].dtype
    assert made.is_contiguous()
    expected = quantised(x, choice_named(name))
    expected = expected.t() if right else expected
    rows, columns = expected.shape
    assert made.shape == ((48, 32) if right else (21, 48))
    assert torch.equal(made.float()[:rows, :columns] * scale.decode, expected)
    assert not made.float()[rows:].any()
    assert not made.float()[:, columns:].any()


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-38, 3e38, torch.inf, torch.nan])
def test_scale_of_extreme_tensors_is_finite(amax: float) -> None:
    scale = tensor_scale(torch.tensor([0.0, amax]), "e4m3")
    assert scale.encode.isfinite()
    assert float(scale.encode * scale.decode) == 1.0


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("right", [False, True])
@pytest.mark.parametrize("blocked", [False, True])
def test_block_operand_holds_the_emulated_numbers(name: str, right: bool, blocked: bool) -> None:
    x = spread(96, 21) if right else spread(21, 96)
    made = block_operand(x, name, right, blocked)
    if not blocked:
        codes = in_blocks(made.scales.view(torch.uint8))
        made = made._replace(scales=codes.view(made.scales.dtype))
    found = numbers(made.elements, made.scales) * made.whole
    expected = quantised(x, choice_named(name), axis=-2 if right else -1)
    expected = expected.t() if right else expected
    if name == "nvfp4":  # which multiplies in two steps
        torch.testing.assert_close(found[:21], expected, rtol=3e-7, atol=0.0)
    else:
        assert torch.equal(found[:21], expected)
    assert not found[21:].any()


@pytest.mark.parametrize("name", BLOCKS)
def test_row_by_row_it_is_what_the_block_kernel_takes(name: str) -> None:
    x = spread(33, 64)
    elements, scales, whole = pack(x, name)
    made = block_operand(x, name, False, False)
    assert torch.equal(made.elements.view(torch.uint8), elements.view(torch.uint8))
    assert torch.equal(made.scales.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(made.whole, whole)


def test_every_pair_of_four_bit_numbers_packs_to_its_codes() -> None:
    fmt = FORMATS["e2m1"]
    single = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((single, -single))
    low, high = torch.meshgrid(values, values, indexing="ij")
    pairs = torch.stack((low.flatten(), high.flatten()), dim=1)
    codes = encode(pairs, fmt)
    expected = (codes[:, 0] | (codes[:, 1] << 4)).to(torch.uint8)
    assert torch.equal(packed_pairs(pairs).flatten(), expected)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 17)])
def test_scales_lie_in_tiles_of_128_rows_and_4_columns(shape: tuple[int, int]) -> None:
    scales = torch.arange(shape[0] * shape[1]).reshape(shape).to(torch.uint8)
    flat = in_blocks(scales)
    assert flat.numel() % 512 == 0
    assert torch.equal(in_rows(flat, *shape), scales)


def test_scales_of_torchao_lie_alike() -> None:
    blocked = pytest.importorskip("torchao.prototype.mx_formats.utils").to_blocked
    scales = torch.randint(255, (300, 17), dtype=torch.uint8)
    assert torch.equal(in_blocks(scales), blocked(scales).flatten())


def test_scale_bytes_are_the_exponents() -> None:
    x = spread(32, 64)
    made = quantise(x, SCALED_FORMATS["mxfp8"].element, SCALED_FORMATS["mxfp8"].scaling)
    codes = block_operand(x, "mxfp8", False, False).scales.view(torch.uint8)
    assert torch.equal(codes.int(), encode(made.scales, E8M0))


@pytest.mark.parametrize("name", BLOCKS)
def test_inductor_compiles_it_to_the_same_bits(name: str) -> None:
    x = spread(40, 64)
    torch._dynamo.reset()
    compiled = torch.compile(block_bytes, fullgraph=True)
    found, expected = compiled(x, name, False, True), block_bytes(x, name, False, True)
    assert torch.equal(found.elements.view(torch.uint8), expected.elements.view(torch.uint8))
    assert torch.equal(found.scales, expected.scales)
    assert torch.equal(found.whole, expected.whole)
