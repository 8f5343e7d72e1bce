"""Fused attention written out in operations that can be differentiated twice.

Used when a graph is interpreted for analysis; the compiled graph keeps the fused kernels.
``tap`` sees every intermediate that the fused kernel rounds to its operands' format.
Formulas: Dao et al., FlashAttention (2022), algorithms 1 and 4 without the tiling.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from precision_compiler.errors import AnalysisError

Tap = Callable[[torch.Tensor], torch.Tensor]


def _probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float,
    logsumexp: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention probabilities and the log of their normaliser, shapes (B, H, T, S), (B, H, T)."""
    scores = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        scores = (
            scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
        )
    if causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, -torch.inf)
    normaliser = scores.logsumexp(-1) if logsumexp is None else logsumexp
    # Rows that see nothing attend to nothing: their scores stay at minus infinity.
    finite = normaliser.masked_fill(normaliser == -torch.inf, 0.0)
    return (scores - finite.unsqueeze(-1)).exp(), normaliser


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return float(query.shape[-1]) ** -0.5 if scale is None else scale


def _per_query_head(heads: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat grouped key or value heads so that every query head has its own."""
    return heads.repeat_interleave(query.shape[1] // heads.shape[1], 1)


def _per_group(gradient: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """Sum a gradient over the query heads that shared a key or value head."""
    batch, groups = heads.shape[:2]
    return gradient.reshape(batch, groups, -1, *gradient.shape[2:]).sum(2)


def forward(
    tap: Tap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and logsumexp of ``aten._scaled_dot_product_flash_attention_for_cpu``."""
    key, value = _per_query_head(key, query), _per_query_head(value, query)
    weights, normaliser = _probabilities(query, key, causal, attn_mask, _scale(query, scale), None)
    return tap(weights) @ value, normaliser


def backward(
    tap: Tap,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value from the saved output and logsumexp."""
    factor = _scale(query, scale)
    keys, values = _per_query_head(key, query), _per_query_head(value, query)
    weights, _ = _probabilities(query, keys, causal, attn_mask, factor, logsumexp)
    along = (grad * out).sum(-1, keepdim=True)
    scores = tap(weights * (grad @ values.transpose(-1, -2) - along))
    rounded = tap(weights)
    grad_value = rounded.transpose(-1, -2) @ grad
    grad_query = scores @ keys * factor
    grad_key = scores.transpose(-1, -2) @ query * factor
    return grad_query, _per_group(grad_key, key), _per_group(grad_value, value)


def efficient_forward(
    tap: Tap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    compute_logsumexp: bool,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Results of ``aten._scaled_dot_product_efficient_attention``, its random state zero.

    Raises:
        AnalysisError: there is dropout.
    """
    if dropout:
        raise AnalysisError(
            f"fused attention drops {dropout:g} of its probabilities, which analysis cannot "
            "repeat: plan the model with attention dropout 0"
        )
    output, normaliser = forward(tap, query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    state = normaliser.new_zeros((), dtype=torch.int64)
    return output, normaliser, state, state


def efficient_backward(
    tap: Tap,
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    seed: torch.Tensor,
    offset: torch.Tensor,
    dropout: float,
    wanted: Sequence[bool],
    causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of query, key, value and, where it is wanted, of the bias.

    Raises:
        AnalysisError: the gradient of the bias is wanted.
    """
    if wanted[3]:
        raise AnalysisError(
            "fused attention is asked for the gradient of its bias, which analysis has no "
            "formula for: compute scores, bias and softmax as separate operations"
        )
    args = (tap, grad, query, key, value, out, logsumexp, 0.0, causal)
    return (*backward(*args, attn_mask=bias, scale=scale), None)


def substitutes() -> dict[Any, Callable[..., Any]]:
    """The formula for each fused attention operation."""
    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu.default: forward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward.default: backward,
        aten._scaled_dot_product_efficient_attention.default: efficient_forward,
        aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
    }
