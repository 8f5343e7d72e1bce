"""Scaled products to be timed: accepted by torch's rules for GPUs, and the product they say."""

import math

import pytest
import torch

from precision_compiler import measure
from precision_compiler.measure import alternate, matmul_flops, timed
from precision_compiler.packing import block_operand
from precision_compiler.scaled_calls import SCALED_PRODUCTS, scaled_call
from precision_compiler.scaling import SCALED_FORMATS


@pytest.mark.parametrize("name", SCALED_PRODUCTS)
@pytest.mark.parametrize("sizes", [(128, 256, 512), (5, 7, 33), (200, 50257, 768)])
def test_torch_accepts_the_sizes_and_layouts(name: str, sizes: tuple[int, int, int]) -> None:
    made = scaled_call(*sizes, name, "meta")()
    m, n, _ = (math.ceil(size / 32) * 32 for size in sizes)
    assert made.shape == (m, n)
    assert made.dtype == torch.bfloat16


def test_the_call_is_a_product_of_finite_numbers() -> None:
    call = scaled_call(32, 64, 32, "e4m3", "cpu")
    left, right = call.args[:2]  # type: ignore[attr-defined]
    expected = left.float() @ right.float()
    assert expected.isfinite().all()
    assert expected.abs().max() > 0
    torch.testing.assert_close(call().float(), expected, rtol=2.0**-8, atol=0)


def test_every_format_that_torch_multiplies_is_rated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "wait_for", lambda device: None)
    found = matmul_flops("meta", 64)
    assert set(found) == {"fp32", "bf16", "fp16", "tf32", *SCALED_PRODUCTS}
    assert all(0 < rate < math.inf for rate in found.values())
    assert set(matmul_flops("cpu", 16)) == {"fp32", "bf16", "fp16"}


def test_a_format_that_torch_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*sizes: object) -> object:
        def call() -> None:
            raise RuntimeError("not on this device")

        return call

    monkeypatch.setattr(measure, "wait_for", lambda device: None)
    monkeypatch.setattr(measure, "scaled_call", refuse)
    assert set(matmul_flops("meta", 64)) == {"fp32", "bf16", "fp16", "tf32"}


def test_a_gpu_is_waited_for_and_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(measure, "wait_for", events.append)
    timed(lambda: events.append("run"), 3, "cuda")
    assert events == ["cuda", "run", "run", "run", "cuda"]
    events.clear()
    alternate({"short": lambda: events.append("run")}, "cuda")
    waits = [index for index, event in enumerate(events) if event == "cuda"]
    runs = [later - earlier - 1 for earlier, later in zip(waits[::2], waits[1::2], strict=True)]
    assert runs[0] == 1  # the first makes the tensors
    assert runs[-1] == 100


@pytest.mark.parametrize("name", [name for name in SCALED_PRODUCTS if name in SCALED_FORMATS])
def test_timed_operands_are_laid_out_as_lowering_packs_them(name: str) -> None:
    call = scaled_call(160, 96, 192, name, "cpu")
    left, right, *scales = call.args  # type: ignore[attr-defined]
    for made, scale, rows in ((left, scales[0], 160), (right.t(), scales[1], 96)):
        packed = block_operand(torch.randn(rows, 192), name, right=False, blocked=True)
        assert (made.dtype, made.shape) == (packed.elements.dtype, packed.elements.shape)
        assert (scale.dtype, scale.shape) == (packed.scales.dtype, packed.scales.shape)
    assert set(scales[0].view(torch.uint8).unique().tolist()) <= {0, *codes_of_one(name)}


def codes_of_one(name: str) -> list[int]:
    one = torch.ones(1).to(SCALED_FORMATS[name].scale_dtype)
    return one.view(torch.uint8).tolist()
