"""ONNX operators that multiply matrices: products, convolutions, attention."""

from typing import Any

import torch

from precision_compiler.importing.operator import Operator, Table, require


def _gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> torch.Tensor:
    left, right = (a.T if transA else a), (b.T if transB else b)
    if c is not None and alpha == beta == 1.0:
        return torch.addmm(c, left, right)
    found = torch.mm(left, right) if alpha == 1.0 else alpha * torch.mm(left, right)
    if c is None:
        return found
    return found + (c if beta == 1.0 else beta * c)


def _einsum(*values: torch.Tensor, equation: str) -> torch.Tensor:
    return torch.einsum(equation, *values)


def _padded(
    x: torch.Tensor, spans: list[int], strides: list[int], pads: list[int] | None, auto_pad: str
) -> tuple[torch.Tensor, list[int]]:
    """The input and the symmetrical padding that remains to be done, per axis."""
    rank = len(spans)
    before, after = (pads[:rank], pads[rank:]) if pads else ([0] * rank, [0] * rank)
    if auto_pad.startswith("SAME"):
        totals = [
            max(0, (-(-size // stride) - 1) * stride + span - size)
            for size, stride, span in zip(x.shape[2:], strides, spans, strict=True)
        ]
        small, large = [n // 2 for n in totals], [n - n // 2 for n in totals]
        before, after = (small, large) if auto_pad == "SAME_UPPER" else (large, small)
    if before == after:
        return x, list(before)
    widths = [w for pair in zip(reversed(before), reversed(after), strict=True) for w in pair]
    return torch.nn.functional.pad(x, widths), [0] * rank


def _convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> torch.Tensor:
    rank = x.dim() - 2
    paces, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    spans = [(size - 1) * gap + 1 for size, gap in zip(weight.shape[2:], gaps, strict=True)]
    x, padding = _padded(x, spans, paces, pads, auto_pad)
    return torch.convolution(x, weight, bias, paces, padding, gaps, False, [0] * rank, group)


def _heads(x: torch.Tensor, count: int | None) -> torch.Tensor:
    """(batch, length, heads x width) as (batch, heads, length, width)."""
    if x.dim() == 4:
        return x
    require(bool(count), "inputs of three dimensions need the number of heads")
    return x.reshape(x.shape[0], x.shape[1], count or 1, -1).transpose(1, 2)


def _mask(
    mask: torch.Tensor | None, query: torch.Tensor, length: int, causal: bool
) -> torch.Tensor | None:
    if not causal:
        return mask
    seen = torch.ones(query.shape[-2], length, dtype=torch.bool).tril()
    if mask is None:
        return seen
    if mask.dtype == torch.bool:
        return mask & seen
    return mask + torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    past_key: torch.Tensor | None = None,
    past_value: torch.Tensor | None = None,
    nonpad_kv_seqlen: torch.Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int = 1,
) -> Any:
    require(not softcap and nonpad_kv_seqlen is None, "softcap and lengths are not supported")
    flat = query.dim() == 3
    query, key = _heads(query, q_num_heads), _heads(key, kv_num_heads)
    value = _heads(value, kv_num_heads)
    if past_key is not None and past_value is not None:
        key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    plain = bool(is_causal) and attn_mask is None and query.shape[-2] == key.shape[-2]
    mask = attn_mask if plain else _mask(attn_mask, query, key.shape[-2], bool(is_causal))
    found = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=plain, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    if flat:
        found = found.transpose(1, 2).flatten(2)
    return found if past_key is None else (found, key, value)


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> torch.Tensor:
    if interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def _rotary(
    x: torch.Tensor,
    cos_cache: torch.Tensor,
    sin_cache: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> torch.Tensor:
    heads = _heads(x, num_heads)
    if position_ids is not None:
        cos_cache, sin_cache = cos_cache[position_ids], sin_cache[position_ids]
    cos, sin = cos_cache.unsqueeze(1), sin_cache.unsqueeze(1)
    width = rotary_embedding_dim or heads.shape[-1]
    found = _rotate(heads[..., :width], cos, sin, bool(interleaved))
    if width < heads.shape[-1]:
        found = torch.cat([found, heads[..., width:]], -1)
    return found if x.dim() == 4 else found.transpose(1, 2).flatten(2)


MATRIX: Table = {
    "MatMul": Operator(torch.matmul),
    "Gemm": Operator(_gemm),
    "Einsum": Operator(_einsum),
    "Conv": Operator(_convolution),
    "Attention": Operator(_attention),
    "RotaryEmbedding": Operator(_rotary),
}
"""How each is computed."""
