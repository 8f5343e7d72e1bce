"""Kernel: matrix product of 8-bit operands with scales, bias, activation and largest magnitude.

    out = activation(scale_a[m] * scale_b[n] * sum_k a[m, k] * b[n, k] + bias[n])

Both operands lie with the summed axis last, the one layout that every tensor core takes in fp8.
Hopper's tensor cores keep about 14 bits of a running sum (DeepSeek-V3 report, 3.5.2): unless
``fast`` is asked for, the sum of every 128 products is added in float32.
"""

from typing import Any

import torch

from precision_compiler.errors import FormatError
from precision_compiler.kernels.contract import Build, Kernel, Work, pointer
from precision_compiler.kernels.device import gelu, magnitude_bits, silu, storage
from precision_compiler.kernels.language import Value, constexpr, jit, require_triton, tl, triton

TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8}
ACTIVATIONS = ("none", "gelu", "silu")
PROMOTE_EVERY = 128


@torch.library.custom_op("precision_compiler::scaled_gemm", mutates_args=())
def scaled_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    fast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiply two fp8 matrices.

    Args:
        a: (M, K), an 8-bit format; K a multiple of 16.
        b: (N, K), an 8-bit format of the same family; N a multiple of 16.
        scale_a: (M,) or (1,), float32: what elements of a row are multiplied by.
        scale_b: (N,) or (1,), float32.
        bias: (N,) or None.
        activation: "none", "gelu" or "silu".
        out_dtype: of the result.
        fast: let tensor cores keep the running sum to the end.

    Returns:
        The product (M, N), and its largest magnitude before it is rounded, (1,), float32.
    """
    return reference(a, b, scale_a, scale_b, bias, activation, out_dtype, fast)


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    fast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_gemm`` in torch with float32 sums, on any device."""
    _check(a, b, scale_a, scale_b, activation)
    product = a.float() @ b.float().t()
    y = product * (scale_a[:, None] * scale_b[None, :])
    y = y if bias is None else y + bias.float()
    if activation == "gelu":
        y = torch.nn.functional.gelu(y)
    elif activation == "silu":
        y = torch.nn.functional.silu(y)
    return y.to(out_dtype, copy=True), y.abs().amax().reshape(1)


@scaled_gemm.register_fake
def _(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    fast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(a, b, scale_a, scale_b, activation)
    out = a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)
    return out, a.new_empty(1, dtype=torch.float32)


def _check(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    activation: str,
) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise FormatError("scaled_gemm takes a of (M, K) and b of (N, K)")
    if a.shape[1] % 16 or b.shape[0] % 16:
        raise FormatError("scaled_gemm: K and N must be multiples of 16")
    if scale_a.numel() not in (1, a.shape[0]) or scale_b.numel() not in (1, b.shape[0]):
        raise FormatError("scaled_gemm: one scale per row of an operand, or one for all of it")
    if activation not in ACTIVATIONS:
        raise FormatError(f"scaled_gemm: activation {activation!r}, not {', '.join(ACTIVATIONS)}")


@jit
def tile_of(M: Value, N: Value, BLOCK_M: constexpr, BLOCK_N: constexpr, GROUP: constexpr) -> Value:
    """Rows and columns of a program's tile; GROUP rows of tiles run together for the cache."""
    program = tl.program_id(0)
    across = tl.cdiv(N, BLOCK_N)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    row = first + program % (GROUP * across) % height
    column = program % (GROUP * across) // height
    return row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)


@jit
def gemm_kernel(
    a: Value,
    b: Value,
    scale_a: Value,
    scale_b: Value,
    bias: Value,
    out: Value,
    amax: Value,
    M: Value,
    N: Value,
    K: Value,
    ROWS_A: constexpr,
    ROWS_B: constexpr,
    BIASED: constexpr,
    ACTIVATION: constexpr,
    PROMOTE: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    GROUP: constexpr,
) -> None:
    """One program per tile of the result."""
    r, c = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K)
    at_a = a + (r % M).to(tl.int64)[:, None] * K + k[None, :]
    at_b = b + (c % N).to(tl.int64)[None, :] * K + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        left = tl.load(at_a, mask=(k < K - first)[None, :], other=0.0)
        right = tl.load(at_b, mask=(k < K - first)[:, None], other=0.0)
        total = tl.dot(left, right, total, max_num_imprecise_acc=PROMOTE)
        at_a += BLOCK_K
        at_b += BLOCK_K
    if ROWS_A:
        total *= tl.load(scale_a + r, mask=r < M, other=0.0)[:, None]
    else:
        total *= tl.load(scale_a)
    if ROWS_B:
        total *= tl.load(scale_b + c, mask=c < N, other=0.0)[None, :]
    else:
        total *= tl.load(scale_b)
    if BIASED:
        total += tl.load(bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        total = gelu(total)
    if ACTIVATION == "silu":
        total = silu(total)
    inside = (r < M)[:, None] & (c < N)[None, :]
    bits = tl.where(inside, magnitude_bits(total), 0)
    tl.atomic_max(amax, tl.max(tl.max(bits, axis=1), axis=0))
    at = out + r.to(tl.int64)[:, None] * N + c[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@scaled_gemm.register_kernel("cuda")
def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    fast: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``scaled_gemm`` by Triton."""
    require_triton()
    _check(a, b, scale_a, scale_b, activation)
    a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty(m, n, dtype=out_dtype)
    amax = a.new_zeros(1, dtype=torch.float32)
    tiles = triton.cdiv(m, TILE["BLOCK_M"]) * triton.cdiv(n, TILE["BLOCK_N"])
    gemm_kernel[(tiles,)](
        a, b, scale_a, scale_b, scale_b if bias is None else bias, out, amax.view(torch.int32),
        m, n, k, ROWS_A=scale_a.numel() == m > 1, ROWS_B=scale_b.numel() == n > 1,
        BIASED=bias is not None, ACTIVATION=activation, PROMOTE=None if fast else PROMOTE_EVERY,
        **TILE, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out, amax


def example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``scaled_gemm`` with ragged sizes."""
    m, n, k = (8192, 4096, 4096) if large else (136, 144, 208)
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(m, k, generator=generator).mul(8).to(storage(format)).to(device)
    b = torch.randn(n, k, generator=generator).mul(8).to(storage(format)).to(device)
    scale_a = torch.rand(m, generator=generator).add(0.5).mul(2.0**-6).to(device)
    scale_b = torch.tensor([2.0**-4], device=device)
    bias = torch.randn(n, generator=generator).to(device)
    return a, b, scale_a, scale_b, bias, "gelu", torch.bfloat16, False


def variants(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, *_: Any
) -> tuple[tuple[Any, ...], ...]:
    """A scale for all of ``a`` and one per row of ``b``, without bias, with other activations."""
    whole = (a, b, scale_a[:1], scale_b.expand(b.shape[0]).contiguous(), None)
    return (*whole, "none", torch.float32, True), (*whole, "silu", torch.float16, False)


def builds(format: str) -> tuple[Build, ...]:
    """Row scales with bias and GELU as in a forward product, promoted tensor scales as backward."""
    signature = {"a": pointer(format), "b": pointer(format), "scale_a": "*fp32"}
    signature |= {"scale_b": "*fp32", "bias": "*fp32", "out": "*bf16", "amax": "*i32"}
    signature |= {"M": "i32", "N": "i32", "K": "i32"}
    forward = TILE | {"ROWS_A": True, "ROWS_B": True, "BIASED": True}
    backward = TILE | {"ROWS_A": False, "ROWS_B": False, "BIASED": False}
    fast = {"ACTIVATION": "gelu", "PROMOTE": None}
    promoted = {"ACTIVATION": "none", "PROMOTE": PROMOTE_EVERY}
    return (
        Build("row scales, bias, gelu, fast", gemm_kernel, signature, {**forward, **fast}),
        Build("tensor scales, promoted", gemm_kernel, signature, {**backward, **promoted}),
    )


def work(format: str) -> Work:
    """8192 x 4096 x 4096: 8-bit operands in, bf16 out."""
    m, n, k = 8192, 4096, 4096
    rate = format.removesuffix("fnuz")
    return Work("8192 x 4096 x 4096", 2 * m * n * k, m * k + n * k + 2 * m * n, rate)


KERNEL = Kernel(
    name="scaled_gemm",
    summary="product of fp8 matrices; tensor or row scales, bias, activation, largest magnitude",
    formats=("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz"),
    matrix=True,
    op=scaled_gemm,
    reference=reference,
    launch=launch,
    example=example,
    builds=builds,
    work=work,
    variants=variants,
)
