"""MX and NVFP4 against torchao: elements and scales bit for bit.

torchao is optional here. Install it with `pip install --no-deps`, so that torch stays as it is.

torchao's MX code differs on purpose or by oversight in blocks whose scale is 2^-127, the smallest:
it divides by 2^-126 (floor) or by 1 (up) there, so only zero blocks of that kind are compared. Its
NVFP4 block scales are never below 2^-6, and what it multiplies numbers by is the same up to the
last place: it takes ``(1 / tensor scale) / block scale``. With float32 data its logarithm may miss
the border between two MX scales by the last place; with bfloat16 data it cannot.
"""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from precision_compiler.codes import decode
from precision_compiler.formats import FORMATS
from precision_compiler.scaled import dequantise, quantise
from precision_compiler.scaling import MX, MX_FLOOR, NVFP4

ELEMENTS: dict[str, torch.dtype | str] = {
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e2m3": "fp6_e2m3",
    "e3m2": "fp6_e3m2",
    "e2m1": torch.float4_e2m1fn_x2,
}
SCALINGS = {"FLOOR": MX_FLOOR, "RCEIL": MX}


@pytest.fixture(scope="module")
def torchao() -> Any:
    """Modules of torchao, imported no earlier than needed: it registers things with torch."""
    pytest.importorskip("torchao")
    folder = "torchao.prototype.mx_formats"
    names = ("mx_tensor", "config", "kernels", "nvfp4_tensor")
    return SimpleNamespace(**{name: import_module(f"{folder}.{name}") for name in names})


def numbers(columns: int, seed: int) -> torch.Tensor:
    """Gaussian rows, of sizes from 2^-60 to 2^60, the first of them zero, as bfloat16 holds."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-60, 61, (1024, 1), generator=generator)
    x = torch.randn(1024, columns, generator=generator) * torch.exp2(sizes.float())
    x[0] = 0.0
    return x.bfloat16().float()


def elements_of(torchao: Any, stored: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    """What torchao stores, as float32."""
    if name in ("e4m3", "e5m2"):
        return stored.float()
    codes = torchao.kernels.unpack_uint4(stored) if name == "e2m1" else stored
    return decode(codes.int(), FORMATS[name]).reshape(shape)


@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("mode", SCALINGS)
def test_mx_agrees_bit_for_bit(torchao: Any, name: str, mode: str) -> None:
    x = numbers(256, 1)
    how = torchao.config.ScaleCalculationMode[mode]
    scales, stored = torchao.mx_tensor.to_mx(x, ELEMENTS[name], 32, how)
    found = quantise(x, FORMATS[name], SCALINGS[mode])
    assert torch.equal(found.scales, scales.float())
    elements = elements_of(torchao, stored, name, x.shape)
    assert torch.equal(found.elements.view(torch.int32), elements.view(torch.int32))
    read = torchao.mx_tensor.to_dtype(stored, scales, ELEMENTS[name], 32, torch.float32)
    assert torch.equal(dequantise(found), read)


@pytest.mark.parametrize("bf16", [False, True])
def test_nvfp4_differs_in_nothing_but_ties_broken_by_the_last_place(
    torchao: Any, bf16: bool
) -> None:
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(2))
    x = x.bfloat16().float() if bf16 else x
    tensor = torchao.nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax())
    scales, stored = torchao.nvfp4_tensor.nvfp4_quantize(x, 16, tensor)
    found = quantise(x, FORMATS["e2m1"], NVFP4)
    assert abs(found.tensor_scale / tensor - 1) <= 2.0**-23
    assert found.scales.min() >= 2.0**-6
    assert torch.equal(found.scales, scales.float())
    differs = found.elements != elements_of(torchao, stored, "e2m1", x.shape)
    assert differs.sum() < 0.001 * x.numel()  # what follows is about few numbers
    whole = found.scales.repeat_interleave(16, -1).double() * found.tensor_scale.double()
    units = (x.double() / whole).abs()[differs]
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], dtype=torch.float64)
    assert bool(((units[:, None] / ties - 1).abs().amin(-1) < 4 * 2.0**-24).all())
