"""Operations of narrow hardware in float32: the formats' own grids, attention's own formulas."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from precision_compiler import attention
from precision_compiler.emulation import (
    EMULATED_ATTENTION,
    QUANTISE,
    emulated_attention,
    emulated_attention_backward,
    quantise,
)
from precision_compiler.errors import FormatError
from precision_compiler.formats import FORMATS, quantised

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
SCALED = tuple(name for name, fmt in FORMATS.items() if fmt.scaled)
NARROW = tuple(name for name in FORMATS if name != "fp32")


def truncated(values: np.ndarray, bits: int) -> np.ndarray:
    """Float32 numbers without their last bits, rounded to nearest, ties to even."""
    word = values.view(np.uint32).astype(np.uint64)
    word += (1 << (bits - 1)) - 1 + ((word >> bits) & 1)
    found: np.ndarray = ((word >> bits) << bits).astype(np.uint32).view(np.float32)
    return found


def cast(dtype: Any) -> Callable[[np.ndarray], np.ndarray]:
    def rounded(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = values.astype(dtype).astype(np.float32)
        return found

    return rounded


GRIDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fp32": lambda values: values,
    "tf32": lambda values: truncated(values, 13),
    "bf16": cast(ml_dtypes.bfloat16),
    "fp16": cast(np.float16),
    "e4m3": cast(ml_dtypes.float8_e4m3fn),
    "e5m2": cast(ml_dtypes.float8_e5m2),
    "e4m3fnuz": cast(ml_dtypes.float8_e4m3fnuz),
    "e5m2fnuz": cast(ml_dtypes.float8_e5m2fnuz),
    "e2m3": cast(ml_dtypes.float6_e2m3fn),
    "e3m2": cast(ml_dtypes.float6_e3m2fn),
    "e2m1": cast(ml_dtypes.float4_e2m1fn),
}
"""Rounding as other people wrote it."""


def spread(size: int = 20000) -> np.ndarray:
    """Random bits with exponents from 2^-20 to 2^7, so that every format has numbers for some."""
    dice = np.random.default_rng(0)
    word = dice.integers(0, 1 << 23, size) | dice.integers(107, 135, size) << 23
    word[: size // 4] &= ~0xFFF  # ties
    signs = dice.choice([-1.0, 1.0], size).astype(np.float32)
    found: np.ndarray = word.astype(np.uint32).view(np.float32) * signs
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_rounds_to_its_own_grid(name: str) -> None:
    """Scaled formats take the power of two that brings the largest number below their largest."""
    values = spread()
    scale = 1.0
    if FORMATS[name].scaled:
        scale = 2.0 ** np.floor(np.log2(FORMATS[name].max_finite / np.abs(values).max()))
        assert FORMATS[name].max_finite / 2 < np.abs(values).max() * scale
    expected = GRIDS[name]((values * scale).astype(np.float32)) / scale
    found = quantise(torch.from_numpy(values), name).numpy()
    assert np.array_equal(found, expected)
    assert name == "fp32" or not np.array_equal(found, values)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(-120, 120), st.sampled_from(SCALED))
def test_scaled_format_is_the_same_at_every_size(exponent: int, name: str) -> None:
    values = torch.from_numpy(spread(500)).clamp(min=0.25)
    moved = quantise(values * 2.0**exponent, name)
    assert torch.equal(moved, quantise(values, name) * 2.0**exponent)


@pytest.mark.parametrize("name", SCALED)
def test_largest_value_never_saturates(name: str) -> None:
    """For every fraction of a binade."""
    for fraction in torch.linspace(1, 2, 257)[:-1]:
        values = torch.tensor([float(fraction), 0.1])
        found = quantise(values, name)
        assert abs(found[0] - values[0]) <= 2.0 ** -FORMATS[name].precision * values[0]


@pytest.mark.parametrize("name", NARROW)
def test_rounding_twice_is_rounding_once(name: str) -> None:
    for seed in range(20):
        values = torch.randn(300, generator=torch.Generator().manual_seed(seed))
        once = quantise(values, name)
        assert torch.equal(quantise(once, name), once)


@pytest.mark.parametrize("name", NARROW)
def test_zeros_and_empty_tensors(name: str) -> None:
    assert torch.equal(quantise(torch.zeros(4, 4), name), torch.zeros(4, 4))
    assert quantise(torch.zeros(0, 4), name).shape == (0, 4)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_or_infinity_does_not_spoil_the_rest(name: str, bad: float) -> None:
    values = torch.tensor([1.0, bad, -0.5, 2.0])
    found = quantise(values, name)
    assert torch.equal(found[[0, 2, 3]], values[[0, 2, 3]])
    if bad != bad:
        assert found[1].isnan()
    elif not FORMATS[name].scaled:
        assert found[1] == torch.inf


def test_unknown_format_is_an_error() -> None:
    with pytest.raises(FormatError, match="e3m4"):
        quantise(torch.ones(2), "e3m4")


@pytest.mark.parametrize("name", FORMATS)
def test_quantise_is_a_sound_operation_that_returns_a_tensor_of_its_own(name: str) -> None:
    values = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)).t()
    torch.library.opcheck(QUANTISE, (values, name))
    found = quantise(values, name)
    assert found.data_ptr() != values.data_ptr()
    assert found.stride() == torch.empty_like(values).stride()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": True, "scale": 0.3},
    "grouped": {"groups": 2, "causal": True},
    "longer keys": {"keys": 11},
}


def attended(case: str, name: str) -> tuple[list[Tensor], list[Any]]:
    """Query, key, value and an output gradient as models lay them out, and the other arguments."""
    options = CASES[case]
    generator = torch.Generator().manual_seed(0)

    def heads(count: int, length: int) -> Tensor:
        return torch.randn(2, length, count, 8, generator=generator).transpose(1, 2)

    keys, groups = options.get("keys", 7), options.get("groups", 4)
    tensors = [heads(4, 7), heads(groups, keys), heads(groups, keys), heads(4, 7)]
    mask = torch.randn(2, 1, 7, keys, generator=generator) if options.get("mask") else None
    causal = options.get("causal", False)
    return [quantised(t, FORMATS[name]) for t in tensors], [causal, mask, options.get("scale")]


def near(one: Tensor, other: Tensor, within: float = 3e-6) -> bool:
    assert one.shape == other.shape
    return float((one.double() - other).norm()) <= within * float(other.norm())


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "e2m1"])  # which has ties
@pytest.mark.parametrize("case", CASES)
def test_attention_is_its_formula_in_float64_with_what_is_inside_rounded(
    case: str, name: str
) -> None:
    (query, key, value, grad), (causal, mask, scale) = attended(case, name)
    out, logsumexp = emulated_attention(query, key, value, 0.0, causal, mask, scale, name)
    wide: Any = (*(tensor.double() for tensor in (query, key, value)), 0.0, causal)
    bias = None if mask is None else mask.double()
    options: Any = {"attn_mask": bias, "scale": scale}

    def tap(inside: Tensor) -> Tensor:
        return quantised(inside, FORMATS[name])

    expected = attention.forward(tap, *wide, **options)
    assert near(out, expected[0])
    assert near(logsumexp, expected[1])
    if name in ("bf16", *SCALED):  # it is the rounding that is seen here
        assert not near(out, attention.forward(lambda x: x, *wide, **options)[0], 1e-4)
    saved: Any = (query, key, value, out, logsumexp)
    found = emulated_attention_backward(grad, *saved, 0.0, causal, mask, scale, name)
    doubled: Any = (*(tensor.double() for tensor in (grad, *saved)), 0.0, causal)
    gradients = attention.backward(tap, *doubled, **options)
    assert all(near(one, other) for one, other in zip(found, gradients, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_attention_has_the_layout_of_the_fused_operation(case: str) -> None:
    (query, key, value, grad), (causal, mask, scale) = attended(case, "bf16")
    options: Any = {"attn_mask": mask, "scale": scale}
    fused = FORWARD(query, key, value, 0.0, causal, **options)
    ours = emulated_attention(query, key, value, 0.0, causal, mask, scale, "bf16")
    given: Any = (grad, query, key, value, *fused, 0.0, causal)
    gradients = BACKWARD(*given, **options)
    emulated = emulated_attention_backward(*given, mask, scale, "bf16")
    pairs = [*zip(ours, fused, strict=True), *zip(emulated, gradients, strict=True)]
    for one, other in pairs:
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
        assert near(one, other, 0.02)
    assert EMULATED_ATTENTION.keys() == {FORWARD, BACKWARD}


@pytest.mark.parametrize("case", CASES)
def test_attention_operations_are_sound(case: str) -> None:
    (query, key, value, grad), (causal, mask, scale) = attended(case, "e4m3")
    rest = (0.0, causal, mask, scale, "e4m3")
    forward, backward = EMULATED_ATTENTION[FORWARD], EMULATED_ATTENTION[BACKWARD]
    torch.library.opcheck(forward, (query, key, value, *rest))
    out, logsumexp = forward(query, key, value, *rest)
    torch.library.opcheck(backward, (grad, query, key, value, out, logsumexp, *rest))
