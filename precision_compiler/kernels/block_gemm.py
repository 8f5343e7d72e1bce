"""Kernel: matrix product of operands with a scale for every 16 or 32 elements.

    out[m, n] = tensor_scale * sum_k (a[m, k] * s_a[m, k / size]) * (b[n, k] * s_b[n, k / size])

The tensor cores apply the block scales themselves (``tl.dot_scaled``): MXFP8 and MXFP4 with e8m0
scales for 32 elements, NVFP4 with e4m3 scales for 16. Elsewhere Triton compiles this to products
in bf16 without a word, so ``targets`` decides where it is offered. Scales are stored row by row;
the blocked order that copies to tensor memory are fastest from is not made yet.
"""

from typing import Any

import torch

from precision_compiler.codes import decode, encode
from precision_compiler.elements import E8M0, FORMATS
from precision_compiler.errors import FormatError
from precision_compiler.kernels.contract import Build, Kernel, Work
from precision_compiler.kernels.language import Value, constexpr, jit, require_triton, tl, triton
from precision_compiler.kernels.scaled_gemm import tile_of
from precision_compiler.scaled import quantise
from precision_compiler.scaling import SCALED_FORMATS

TILE = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "GROUP": 8}
KINDS = {"mxfp8": ("e4m3", 1, 32), "mxfp4": ("e2m1", 2, 32), "nvfp4": ("e2m1", 2, 16)}
"""Element format in Triton's words, elements per byte, elements per scale."""


@torch.library.custom_op("precision_compiler::block_gemm", mutates_args=())
def block_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    tensor_scale: torch.Tensor,
    format: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Multiply two block-scaled matrices.

    Args:
        a: (M, K) e4m3 for mxfp8; (M, K / 2) uint8 for formats of 4 bits, the even element in the
            low half; K a multiple of 32.
        b: (N, K) or (N, K / 2), the same format; N a multiple of 16.
        scales_a: (M, K / size): e8m0 codes as uint8, or e4m3 for nvfp4.
        scales_b: (N, K / size).
        tensor_scale: (1,), float32, the product of both operands' tensor scales; 1 for MX.
        format: "mxfp8", "mxfp4" or "nvfp4".
        out_dtype: of the result (M, N).
    """
    return reference(a, b, scales_a, scales_b, tensor_scale, format, out_dtype)


def reference(
    a: torch.Tensor,
    b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    tensor_scale: torch.Tensor,
    format: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``block_gemm`` in torch with float32 sums, on any device."""
    _check(a, b, scales_a, scales_b, format)
    left, right = _numbers(a, scales_a, format), _numbers(b, scales_b, format)
    return (left @ right.t() * tensor_scale).to(out_dtype)


def _numbers(x: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    _, packed, size = KINDS[format]
    if packed == 2:
        codes = torch.stack((x & 15, x >> 4), dim=-1).flatten(1)
        elements = decode(codes, FORMATS["e2m1"])
    else:
        elements = x.float()
    factors = scales.float() if format == "nvfp4" else decode(scales, E8M0)
    return elements * factors.repeat_interleave(size, dim=1)


def pack(x: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise (M, K) float32 numbers to what ``block_gemm`` takes: elements, scales, tensor's."""
    kind = SCALED_FORMATS[format]
    made = quantise(x, kind.element, kind.scaling)
    scales = made.scales.to(torch.float8_e4m3fn)
    if format != "nvfp4":
        scales = encode(made.scales, E8M0).to(torch.uint8)
    if KINDS[format][1] == 1:
        return made.elements.to(torch.float8_e4m3fn), scales, made.tensor_scale
    codes = encode(made.elements, kind.element).to(torch.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4), scales, made.tensor_scale


@block_gemm.register_fake
def _(
    a: torch.Tensor,
    b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    tensor_scale: torch.Tensor,
    format: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    _check(a, b, scales_a, scales_b, format)
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


def _check(
    a: torch.Tensor, b: torch.Tensor, scales_a: torch.Tensor, scales_b: torch.Tensor, format: str
) -> None:
    if format not in KINDS:
        raise FormatError(f"block_gemm multiplies {', '.join(KINDS)}, not {format}")
    _, packed, size = KINDS[format]
    k = a.shape[1] * packed
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or k % 32 or b.shape[0] % 16:
        raise FormatError("block_gemm takes a of (M, K), b of (N, K), K % 32 == 0 and N % 16 == 0")
    if scales_a.shape != (a.shape[0], k // size) or scales_b.shape != (b.shape[0], k // size):
        raise FormatError(f"block_gemm: {format} has one scale for every {size} elements of a row")


@jit
def block_kernel(
    a: Value,
    b: Value,
    scales_a: Value,
    scales_b: Value,
    tensor_scale: Value,
    out: Value,
    M: Value,
    N: Value,
    K: Value,
    KIND: constexpr,
    PACKED: constexpr,
    SIZE: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    GROUP: constexpr,
) -> None:
    """One program per tile of the result."""
    r, c = tile_of(M, N, BLOCK_M, BLOCK_N, GROUP)
    k = tl.arange(0, BLOCK_K // PACKED)
    s = tl.arange(0, BLOCK_K // SIZE)
    rows, columns = (r % M).to(tl.int64), (c % N).to(tl.int64)
    at_a = a + rows[:, None] * (K // PACKED) + k[None, :]
    at_b = b + columns[None, :] * (K // PACKED) + k[:, None]
    at_scales_a = scales_a + rows[:, None] * (K // SIZE) + s[None, :]
    at_scales_b = scales_b + columns[:, None] * (K // SIZE) + s[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        inside = k < (K - first) // PACKED
        scaled = (s < (K - first) // SIZE)[None, :]
        left = tl.load(at_a, mask=inside[None, :], other=0.0)
        right = tl.load(at_b, mask=inside[:, None], other=0.0)
        scale_left = tl.load(at_scales_a, mask=scaled, other=0.0)
        scale_right = tl.load(at_scales_b, mask=scaled, other=0.0)
        total = tl.dot_scaled(left, scale_left, KIND, right, scale_right, KIND, total)
        at_a += BLOCK_K // PACKED
        at_b += BLOCK_K // PACKED
        at_scales_a += BLOCK_K // SIZE
        at_scales_b += BLOCK_K // SIZE
    total *= tl.load(tensor_scale)
    at = out + r.to(tl.int64)[:, None] * N + c[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(r < M)[:, None] & (c < N)[None, :])


@block_gemm.register_kernel("cuda")
def launch(
    a: torch.Tensor,
    b: torch.Tensor,
    scales_a: torch.Tensor,
    scales_b: torch.Tensor,
    tensor_scale: torch.Tensor,
    format: str,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """``block_gemm`` by Triton."""
    require_triton()
    _check(a, b, scales_a, scales_b, format)
    kind, packed, size = KINDS[format]
    a, b, scales_a, scales_b = (x.contiguous() for x in (a, b, scales_a, scales_b))
    m, n, k = a.shape[0], b.shape[0], a.shape[1] * packed
    out = a.new_empty(m, n, dtype=out_dtype)
    tiles = triton.cdiv(m, TILE["BLOCK_M"]) * triton.cdiv(n, TILE["BLOCK_N"])
    block_kernel[(tiles,)](
        a, b, scales_a, scales_b, tensor_scale, out, m, n, k,
        KIND=kind, PACKED=packed, SIZE=size, **TILE, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out


def example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``block_gemm`` with ragged sizes and blocks of very different magnitudes."""
    m, n, k = (8192, 4096, 4096) if large else (136, 144, 160)
    generator = torch.Generator().manual_seed(4)
    spread = torch.logspace(-1, 1, k // 32).repeat_interleave(32)
    a, scales_a, one = pack(torch.randn(m, k, generator=generator) * spread, format)
    b, scales_b, other = pack(torch.randn(n, k, generator=generator), format)
    moved = (x.to(device) for x in (a, b, scales_a, scales_b, (one * other).reshape(1)))
    return (*moved, format, torch.float32)


def builds(format: str) -> tuple[Build, ...]:
    """One product with float32 sums and a bf16 result."""
    kind, packed, size = KINDS[format]
    element = "*u8" if packed == 2 else "*fp8e4nv"
    scale = "*fp8e4nv" if format == "nvfp4" else "*u8"
    signature = {"a": element, "b": element, "scales_a": scale, "scales_b": scale}
    signature |= {"tensor_scale": "*fp32", "out": "*bf16", "M": "i32", "N": "i32", "K": "i32"}
    constants = {"KIND": kind, "PACKED": packed, "SIZE": size} | TILE
    return (Build("", block_kernel, signature, constants),)


def work(format: str) -> Work:
    """8192 x 4096 x 4096: operands with their scales in, bf16 out."""
    m, n, k = 8192, 4096, 4096
    operands = (m + n) * k * SCALED_FORMATS[format].bytes
    return Work("8192 x 4096 x 4096", 2 * m * n * k, operands + 2 * m * n, format)


KERNEL = Kernel(
    name="block_gemm",
    summary="product of block-scaled matrices",
    formats=("mxfp8", "mxfp4", "nvfp4"),
    matrix=True,
    op=block_gemm,
    reference=reference,
    launch=launch,
    example=example,
    builds=builds,
    work=work,
)
