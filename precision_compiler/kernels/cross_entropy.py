"""Kernel: last linear layer and cross entropy in one, over chunks of the vocabulary.

    loss = mean over tokens of  log(sum_v exp(h . w_v)) - h . w_target

Logits of T tokens and V words take 4 T V bytes in float32, gigabytes for a large vocabulary, and
are never stored: the forward pass keeps a running maximum and sum in registers (Milakov and
Gimelshein, arXiv 1805.02867), the backward pass computes logits again, a chunk of the vocabulary
at a time, and stores their gradients in the format of the hidden states.
"""

from typing import Any

import torch

from precision_compiler.errors import FormatError
from precision_compiler.kernels.contract import Build, Kernel, Work
from precision_compiler.kernels.language import Value, constexpr, jit, require_triton, tl, triton

TILE = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64}
CHUNK = 8192
PARTS = 8
Pair = tuple[torch.Tensor, torch.Tensor]


@torch.library.custom_op("precision_compiler::linear_cross_entropy", mutates_args=())
def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore: int
) -> Pair:
    """Mean cross entropy of ``hidden @ weight.T``.

    Args:
        hidden: (T, D), bf16 (float32 and float64 too on the CPU).
        weight: (V, D), the same dtype.
        target: (T,), int64, the index of the right word.
        ignore: value of ``target`` for tokens that do not count.

    Returns:
        The loss, a single number, and each token's log-sum-exp (T,), both float32 or wider.
    """
    return reference(hidden, weight, target, ignore)


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore: int
) -> Pair:
    """``linear_cross_entropy`` in torch, on any device."""
    _check(hidden, weight, target)
    wide = _wide(hidden)
    total = hidden.new_full((hidden.shape[0],), -torch.inf, dtype=wide)
    picked = torch.zeros_like(total)
    for first in range(0, weight.shape[0], CHUNK):
        logits = hidden.to(wide) @ weight[first : first + CHUNK].to(wide).t()
        total = torch.logaddexp(total, logits.logsumexp(1))
        here, column = _within(target, first, logits.shape[1])
        picked += torch.where(here, logits.gather(1, column[:, None]).squeeze(1), 0.0)
    return _mean(total, picked, target, ignore), total


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _within(target: torch.Tensor, first: int, width: int) -> Pair:
    """Whether each target is in a chunk, and its column there (0 if not)."""
    here = (target >= first) & (target < first + width)
    return here, torch.where(here, target - first, 0)


def _mean(
    total: torch.Tensor, picked: torch.Tensor, target: torch.Tensor, ignore: int
) -> torch.Tensor:
    kept = target != ignore
    return torch.where(kept, total - picked, 0.0).sum() / kept.sum()


def _factor(grad: torch.Tensor, target: torch.Tensor, ignore: int) -> torch.Tensor:
    """The gradient of the loss that each token gets, (T,)."""
    kept = target != ignore
    return torch.where(kept, grad / kept.sum(), 0.0)


@linear_cross_entropy.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore: int) -> Pair:
    _check(hidden, weight, target)
    wide = _wide(hidden)
    return hidden.new_empty((), dtype=wide), hidden.new_empty(hidden.shape[0], dtype=wide)


def _check(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise FormatError("linear_cross_entropy takes hidden (T, D) and weight (V, D)")
    if target.shape != hidden.shape[:1]:
        raise FormatError("linear_cross_entropy takes one target per row of hidden")


@torch.library.custom_op("precision_compiler::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    ignore: int,
) -> Pair:
    """Gradients of hidden and weight.

    With ``p = exp(h . w_v - total)``: the logits' gradient is ``(p - [v = target]) grad / count``,
    multiplied by weight and by hidden.

    Args:
        grad: gradient of the loss, a single number.
        hidden: (T, D).
        weight: (V, D).
        target: (T,).
        total: (T,), the log-sum-exp of the forward pass.
        ignore: as in the forward pass.
    """
    return backward_reference(grad, hidden, weight, target, total, ignore)


def backward_reference(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    ignore: int,
) -> Pair:
    """``linear_cross_entropy_backward`` in torch, on any device."""
    wide = _wide(hidden)
    factor = _factor(grad.to(wide), target, ignore)
    h = hidden.to(wide)
    grad_hidden, grad_weight = torch.zeros_like(h), torch.empty_like(weight)
    for first in range(0, weight.shape[0], CHUNK):
        w = weight[first : first + CHUNK].to(wide)
        change = torch.exp(h @ w.t() - total[:, None])
        here, column = _within(target, first, w.shape[0])
        change.scatter_add_(1, column[:, None], -here.to(wide)[:, None])
        change *= factor[:, None]
        grad_hidden += change @ w
        grad_weight[first : first + CHUNK] = (change.t() @ h).to(weight.dtype)
    return grad_hidden.to(hidden.dtype), grad_weight


@linear_cross_entropy_backward.register_fake
def _(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    ignore: int,
) -> Pair:
    return torch.empty_like(hidden), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Pair) -> None:
    *tensors, ctx.ignore = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor | None) -> tuple[Any, ...]:
    hidden, weight, target, total = ctx.saved_tensors
    grads = linear_cross_entropy_backward(grad, hidden, weight, target, total, ctx.ignore)
    return *grads, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_save)


@jit
def logits_tile(
    hidden: Value,
    weight: Value,
    t: Value,
    v: Value,
    T: Value,
    V: Value,
    D: Value,
    BLOCK_T: constexpr,
    BLOCK_V: constexpr,
    BLOCK_D: constexpr,
) -> Value:
    """Logits of a tile of tokens and words, float32; words beyond the last repeat others."""
    d = tl.arange(0, BLOCK_D)
    at_hidden = hidden + (t % T).to(tl.int64)[:, None] * D + d[None, :]
    at_weight = weight + (v % V).to(tl.int64)[None, :] * D + d[:, None]
    logits = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for first in range(0, D, BLOCK_D):
        left = tl.load(at_hidden, mask=(d < D - first)[None, :], other=0.0)
        right = tl.load(at_weight, mask=(d < D - first)[:, None], other=0.0)
        logits = tl.dot(left, right, logits)
        at_hidden += BLOCK_D
        at_weight += BLOCK_D
    return logits


@jit
def forward_kernel(
    hidden: Value,
    weight: Value,
    target: Value,
    maxima: Value,
    sums: Value,
    picked: Value,
    T: Value,
    V: Value,
    D: Value,
    SPAN: Value,
    BLOCK_T: constexpr,
    BLOCK_V: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """One program per tokens' tile and part of the vocabulary (SPAN words)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    first = tl.program_id(1) * SPAN
    word = tl.load(target + t, mask=t < T, other=-1)
    highest = tl.full((BLOCK_T,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    right = tl.zeros((BLOCK_T,), tl.float32)
    for start in range(first, tl.minimum(first + SPAN, V), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        logits = logits_tile(hidden, weight, t, v, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D)
        logits = tl.where((v < V)[None, :], logits, -1e38)
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        total = total * tl.exp(highest - raised) + tl.sum(tl.exp(logits - raised[:, None]), axis=1)
        right += tl.sum(tl.where(v[None, :] == word[:, None], logits, 0.0), axis=1)
        highest = raised
    at = tl.program_id(1) * T + t
    tl.store(maxima + at, highest, mask=t < T)
    tl.store(sums + at, total, mask=t < T)
    tl.store(picked + at, right, mask=t < T)


@jit
def backward_kernel(
    hidden: Value,
    weight: Value,
    target: Value,
    total: Value,
    factor: Value,
    change: Value,
    T: Value,
    V: Value,
    D: Value,
    START: Value,
    WIDTH: Value,
    BLOCK_T: constexpr,
    BLOCK_V: constexpr,
    BLOCK_D: constexpr,
) -> None:
    """One program per tile of the gradients of a chunk's logits, words START to START + WIDTH."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = logits_tile(hidden, weight, t, START + c, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D)
    word = tl.load(target + t, mask=t < T, other=-1)
    share = tl.exp(logits - tl.load(total + t, mask=t < T, other=0.0)[:, None])
    share -= tl.where((START + c)[None, :] == word[:, None], 1.0, 0.0)
    share *= tl.load(factor + t, mask=t < T, other=0.0)[:, None]
    at = change + t.to(tl.int64)[:, None] * WIDTH + c[None, :]
    inside = (t < T)[:, None] & (c < WIDTH)[None, :]
    tl.store(at, share.to(change.dtype.element_ty), mask=inside)


@linear_cross_entropy.register_kernel("cuda")
def launch(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, ignore: int) -> Pair:
    """``linear_cross_entropy`` by Triton."""
    require_triton()
    _check(hidden, weight, target)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (tokens, depth), words = hidden.shape, weight.shape[0]
    span = triton.cdiv(triton.cdiv(words, PARTS), TILE["BLOCK_V"]) * TILE["BLOCK_V"]
    parts = triton.cdiv(words, span)
    maxima, sums, picked = hidden.new_empty(3, parts, tokens, dtype=torch.float32)
    forward_kernel[(triton.cdiv(tokens, TILE["BLOCK_T"]), parts)](
        hidden, weight, target, maxima, sums, picked, tokens, words, depth, span,
        **TILE, num_warps=8, num_stages=3,
    )  # fmt: skip
    total = torch.logsumexp(maxima + sums.log(), dim=0)
    return _mean(total, picked.sum(0), target, ignore), total


@linear_cross_entropy_backward.register_kernel("cuda")
def backward_launch(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    total: torch.Tensor,
    ignore: int,
) -> Pair:
    """``linear_cross_entropy_backward``: Triton for logits, the library for the two products."""
    require_triton()
    hidden, weight = hidden.contiguous(), weight.contiguous()
    (tokens, depth), words = hidden.shape, weight.shape[0]
    factor = _factor(grad.float(), target, ignore)
    grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
    grad_weight = torch.empty_like(weight)
    for first in range(0, words, CHUNK):
        width = min(CHUNK, words - first)
        change = hidden.new_empty(tokens, width)
        grid = (triton.cdiv(tokens, TILE["BLOCK_T"]), triton.cdiv(width, TILE["BLOCK_V"]))
        backward_kernel[grid](
            hidden, weight, target, total, factor, change, tokens, words, depth, first, width,
            **TILE, num_warps=8, num_stages=3,
        )  # fmt: skip
        grad_hidden += change @ weight[first : first + width]
        grad_weight[first : first + width] = change.t() @ hidden
    return grad_hidden.to(hidden.dtype), grad_weight


def example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``linear_cross_entropy``: ragged sizes, a token that does not count."""
    tokens, words, depth = (8192, 128256, 4096) if large else (136, 300, 80)
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(tokens, depth, generator=generator).bfloat16().to(device)
    weight = torch.randn(words, depth, generator=generator).mul(depth**-0.5).bfloat16().to(device)
    target = torch.randint(0, words, (tokens,), generator=generator)
    target[3] = -100
    return hidden, weight, target.to(device), -100


def backward_example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``linear_cross_entropy_backward``."""
    hidden, weight, target, ignore = example(format, device, large)
    _, total = linear_cross_entropy(hidden, weight, target, ignore)
    return torch.tensor(1.0, device=device), hidden, weight, target, total, ignore


_SHARED = {"hidden": "*bf16", "weight": "*bf16", "target": "*i64"}
_SIZES = {"T": "i32", "V": "i32", "D": "i32"}


def builds(format: str) -> tuple[Build, ...]:
    """The forward kernel."""
    parts = {"maxima": "*fp32", "sums": "*fp32", "picked": "*fp32"}
    return (Build("", forward_kernel, _SHARED | parts | _SIZES | {"SPAN": "i32"}, TILE),)


def backward_builds(format: str) -> tuple[Build, ...]:
    """The backward kernel."""
    given = {"total": "*fp32", "factor": "*fp32", "change": "*bf16"}
    return (
        Build(
            "", backward_kernel, _SHARED | given | _SIZES | {"START": "i32", "WIDTH": "i32"}, TILE
        ),
    )


def work(format: str) -> Work:
    """8192 tokens, 128256 words of 4096 numbers: one product, its operands read."""
    t, v, d = 8192, 128256, 4096
    return Work("8192 tokens, 128256 words, depth 4096", 2 * t * v * d, 2 * (t + v) * d, "bf16")


def backward_work(format: str) -> Work:
    """As the forward pass, and two further products; gradients of logits written and read twice."""
    t, v, d = 8192, 128256, 4096
    size = 2 * (t + 3 * v) * d + 6 * t * v + 4 * t * d * 2 * (v // CHUNK)
    return Work("8192 tokens, 128256 words, depth 4096", 6 * t * v * d, size, "bf16")


KERNEL = Kernel(
    name="linear_cross_entropy",
    summary="last linear layer and cross entropy, no logits stored",
    formats=("bf16",),
    matrix=True,
    op=linear_cross_entropy,
    reference=reference,
    launch=launch,
    example=example,
    builds=builds,
    work=work,
)
BACKWARD = Kernel(
    name="linear_cross_entropy_backward",
    summary="its gradients, over chunks of the vocabulary",
    formats=("bf16",),
    matrix=True,
    op=linear_cross_entropy_backward,
    reference=backward_reference,
    launch=backward_launch,
    example=backward_example,
    builds=backward_builds,
    work=backward_work,
)
