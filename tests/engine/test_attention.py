"""Attention written out: the fused operations' numbers, and derivatives of every order."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from precision_compiler import attention
from precision_compiler.errors import AnalysisError
from precision_compiler.graph import ATTENTION

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "mask": {"mask": "float"},
    "padding": {"mask": "padding"},
    "scale": {"scale": 0.3},
    "grouped": {"groups": 2},
    "grouped causal": {"groups": 1, "causal": True, "scale": 1.5},
    "longer keys": {"keys": 11},
}


def same(value: Tensor) -> Tensor:
    return value


def tensors(
    groups: int = 4, keys: int = 7, mask: str | None = None, **_options: Any
) -> tuple[list[Tensor], Tensor | None]:
    """Query, key and value in float64, and the additive mask."""
    generator = torch.Generator().manual_seed(0)

    def drawn(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, 8, generator=generator, dtype=torch.float64)

    bias = None
    if mask is not None:
        bias = torch.randn(2, 1, 7, keys, generator=generator, dtype=torch.float64)
    if mask == "padding" and bias is not None:
        bias = torch.zeros_like(bias)
        bias[1, :, :, 4:] = -torch.inf
    return [drawn(4, 7), drawn(groups, keys), drawn(groups, keys)], bias


@pytest.mark.parametrize("case", CASES)
def test_forward_is_scaled_dot_product_attention(case: str) -> None:
    options = CASES[case]
    (query, key, value), bias = tensors(**options)
    causal, scale = options.get("causal", False), options.get("scale")
    found, _ = attention.forward(same, query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    expected = F.scaled_dot_product_attention(
        query, key, value, bias, is_causal=causal, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_both_directions_are_the_fused_operations(case: str, dtype: torch.dtype) -> None:
    options = CASES[case]
    wide, bias = tensors(**options)
    query, key, value = (tensor.to(dtype) for tensor in wide)
    mask = None if bias is None else bias.to(dtype)
    keywords: dict[str, Any] = {"attn_mask": mask, "scale": options.get("scale")}
    causal = options.get("causal", False)
    out, logsumexp = FORWARD(query, key, value, 0.0, causal, **keywords)
    found = attention.forward(same, query, key, value, 0.0, causal, **keywords)
    torch.testing.assert_close(found[0], out)
    torch.testing.assert_close(found[1].to(logsumexp.dtype), logsumexp)
    grad = torch.randn_like(out)
    arguments = (grad, query, key, value, out, logsumexp, 0.0, causal)
    for one, other in zip(
        attention.backward(same, *arguments, **keywords), BACKWARD(*arguments, **keywords),
        strict=True,
    ):  # fmt: skip
        assert one.shape == other.shape
        torch.testing.assert_close(one, other)


def test_mask_of_truth_values_hides_what_is_false() -> None:
    (query, key, value), _ = tensors()
    mask = torch.rand(7, 7, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[:, 0] = True
    found, _ = attention.forward(same, query, key, value, attn_mask=mask)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(query, key, value, mask))


def test_row_that_sees_nothing_gives_zero_and_no_nan() -> None:
    (query, key, value), _ = tensors()
    mask = torch.zeros(7, 7, dtype=torch.float64)
    mask[3] = -torch.inf
    found, logsumexp = attention.forward(same, query, key, value, attn_mask=mask)
    assert torch.equal(found[:, :, 3], torch.zeros(2, 4, 8, dtype=torch.float64))
    grad = torch.ones_like(found)
    gradients = attention.backward(
        same, grad, query, key, value, found, logsumexp, 0.0, False, attn_mask=mask
    )
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("case", ["plain", "causal", "mask", "grouped"])
def test_gradients_written_out_are_those_of_autograd(case: str) -> None:
    options = CASES[case]
    leaves, bias = tensors(**options)
    query, key, value = (leaf.requires_grad_() for leaf in leaves)
    causal = options.get("causal", False)
    out, logsumexp = attention.forward(same, query, key, value, 0.0, causal, attn_mask=bias)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, grad)
    found = attention.backward(
        same, grad, query, key, value, out, logsumexp, 0.0, causal, attn_mask=bias
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("causal", [False, True])
def test_derivatives_of_second_order_are_right(causal: bool) -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention.forward(same, query, key, value, 0.0, causal)[0]

    def both(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp = attention.forward(same, query, key, value, 0.0, causal)
        return attention.backward(same, grad, query, key, value, out, logsumexp, 0.0, causal)

    generator = torch.Generator().manual_seed(2)
    small = [
        torch.randn(1, 2, 3, 2, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(4)
    ]
    assert torch.autograd.gradcheck(attend, small[:3])
    assert torch.autograd.gradgradcheck(attend, small[:3])
    assert torch.autograd.gradcheck(both, small)


def test_taps_see_what_the_kernel_rounds_inside() -> None:
    (query, key, value), _ = tensors()
    seen: list[Tensor] = []

    def tap(value: Tensor) -> Tensor:
        seen.append(value)
        return value

    out, logsumexp = attention.forward(tap, query, key, value)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 7, dtype=torch.float64))
    attention.backward(tap, torch.ones_like(out), query, key, value, out, logsumexp, 0.0, False)
    assert [value.shape for value in seen] == [(2, 4, 7, 7)] * 3


def test_every_fused_operation_has_its_formula() -> None:
    assert set(attention.substitutes()) == set(ATTENTION)


@pytest.mark.parametrize("masked", [False, True])
def test_gpu_attention_has_the_formulas_of_the_cpu(masked: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value, grad = torch.randn(4, 2, 4, 7, 8, generator=generator, dtype=torch.float64)
    bias = torch.randn(7, 7, generator=generator, dtype=torch.float64) if masked else None

    def tap(inside: Tensor) -> Tensor:
        return inside

    wanted = attention.forward(tap, query, key, value, 0.0, not masked, attn_mask=bias)
    found = attention.efficient_forward(tap, query, key, value, bias, True, 0.0, not masked)
    assert torch.equal(found[0], wanted[0])
    given = (grad, query, key, value)
    back = attention.backward(tap, *given, *wanted, 0.0, not masked, attn_mask=bias)
    options = (0.0, [True, True, True, False], not masked)
    *gradients, none = attention.efficient_backward(tap, *given, bias, *found, *options)
    assert none is None
    assert all(torch.equal(a, b) for a, b in zip(gradients, back, strict=True) if a is not None)
    assert None not in gradients


def test_gpu_attention_with_dropout_or_a_trained_bias_is_refused() -> None:
    x = torch.zeros(1, 1, 4, 8)
    with pytest.raises(AnalysisError, match=r"drops 0\.1 of its probabilities"):
        attention.efficient_forward(lambda y: y, x, x, x, None, True, 0.1)
    with pytest.raises(AnalysisError, match="gradient of its bias"):
        attention.efficient_backward(
            lambda y: y, x, x, x, x, None, x, x[..., 0], x, x, 0.0, [True] * 4
        )
