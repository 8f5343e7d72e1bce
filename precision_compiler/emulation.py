"""Operations that compute what narrow hardware would, in float32 on any machine.

Exact to the format: operands rounded, products accumulated in float32, results rounded by whoever
stores them. Scales are powers of two taken from each tensor's own largest magnitude.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

from precision_compiler import attention
from precision_compiler.formats import choice_named, quantised
from precision_compiler.scaling import Content

aten = torch.ops.aten


@torch.library.custom_op("precision_compiler::quantise", mutates_args=())
def quantise(
    x: torch.Tensor,
    name: str,
    axis: int = -1,
    amax: float | None = None,
    content: str = "activation",
) -> torch.Tensor:
    """Round a tensor to a format and return it in its own dtype.

    A scaled format is scaled by the power of two that brings the tensor's amax just below the
    format's largest number; the scale is taken out again, both exactly. With ``amax`` given, the
    scale is the one for that and what it leaves out of range saturates. Rows and blocks that share
    a scale lie along ``axis``, the one that a product sums over. Recipes ask what the operand is
    (``scaling.Content``); stochastic rounding draws from torch's own generator.
    """
    made = quantised(x, choice_named(name), amax, axis, cast(Content, content))
    if made is not x and made.stride() == torch.empty_like(x, device="meta").stride():
        return made
    return torch.empty_like(x).copy_(made)  # a new tensor, laid out as its fake twin says


quantise.register_fake(lambda x, *_, **__: torch.empty_like(x))


@torch.library.custom_op("precision_compiler::attention", mutates_args=())
def emulated_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    causal: bool,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fused attention whose probabilities enter the second product in a format.

    Query, key and value are rounded before. Returns the output and the logsumexp in the layout
    of ``aten._scaled_dot_product_flash_attention_for_cpu``.
    """
    options: Any = {"attn_mask": attn_mask, "scale": scale}
    made = attention.forward(_rounding(name), query, key, value, dropout, causal, **options)
    output, logsumexp = _laid_out(made, _FORWARD, (query, key, value, dropout, causal), options)
    return output, logsumexp


@emulated_attention.register_fake
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool,
    attn_mask: torch.Tensor | None, scale: float | None, name: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    made = _FORWARD(query, key, value, dropout, causal, attn_mask=attn_mask, scale=scale)
    return made[0], made[1]


@torch.library.custom_op("precision_compiler::attention_backward", mutates_args=())
def emulated_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    dropout: float,
    causal: bool,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of fused attention whose probabilities and their gradients are in a format."""
    options: Any = {"attn_mask": attn_mask, "scale": scale}
    args: Any = (grad, query, key, value, out, logsumexp, dropout, causal)
    made = attention.backward(_rounding(name), *args, **options)
    for_query, for_key, for_value = _laid_out(made, _BACKWARD, args, options)
    return for_query, for_key, for_value


@emulated_attention_backward.register_fake
def _(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, logsumexp: torch.Tensor, dropout: float, causal: bool,
    attn_mask: torch.Tensor | None, scale: float | None, name: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    args = (grad, query, key, value, out, logsumexp, dropout, causal)
    made = _BACKWARD(*args, attn_mask=attn_mask, scale=scale)
    return made[0], made[1], made[2]


_FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default

QUANTISE = torch.ops.precision_compiler.quantise.default

EMULATED_ATTENTION: dict[Any, Any] = {
    _FORWARD: torch.ops.precision_compiler.attention.default,
    _BACKWARD: torch.ops.precision_compiler.attention_backward.default,
}
"""The emulation of each fused attention operation: its own arguments by position, then a format."""


def _rounding(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    fmt = choice_named(name)
    return lambda x: quantised(x, fmt)


def _laid_out(
    made: tuple[torch.Tensor, ...], like: Any, args: Any, options: Any
) -> tuple[torch.Tensor, ...]:
    """The tensors with the strides that the fused operation would return them in."""
    shapes = torch.utils._pytree.tree_map(_shape_only, (args, options))
    wanted = like(*shapes[0], **shapes[1])
    return tuple(
        torch.empty_strided(w.shape, w.stride(), dtype=x.dtype, device=x.device).copy_(x)
        for x, w in zip(made, wanted, strict=True)
    )


def _shape_only(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value
