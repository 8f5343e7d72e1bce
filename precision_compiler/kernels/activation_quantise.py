"""Kernel: GELU or SwiGLU, scale and quantise, in both orientations.

    y = x * Phi(x)                                        GELU
    y = gate * sigmoid(gate) * up                         SwiGLU

One read of the inputs; the result never exists in a wide format. Scales are those of MX, or one
for the tensor that is known before (delayed scaling), in which case the largest magnitude is
returned for the next step.
"""

from typing import Any

import torch

from precision_compiler.elements import FORMATS
from precision_compiler.errors import FormatError
from precision_compiler.kernels.contract import Build, Kernel, Work, pointer, quantised_pair
from precision_compiler.kernels.device import (
    gelu,
    grid_constants,
    magnitude_bits,
    mx_tile,
    round_to_grid,
    silu,
    storage,
)
from precision_compiler.kernels.language import Value, constexpr, jit, require_triton, tl, triton
from precision_compiler.rounding import round_to

ROWS, COLUMNS = 64, 64
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("precision_compiler::activation_quantise", mutates_args=())
def activation_quantise(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None, format: str
) -> Parts:
    """Apply an activation and quantise its result.

    Args:
        x: (M, N), float32, bf16 or fp16: GELU's input, or SwiGLU's gate.
        up: (M, N), what SwiGLU multiplies with; None for GELU.
        scale: one float32 number that results are multiplied by before rounding; None for MX
            blocks of 32, for which N is a multiple of 32.
        format: of the elements, an 8-bit one.

    Returns:
        Elements (M, N) and e8m0 codes (M, N / 32), or empty; transposed elements (N, M) and codes
        (N, ceil(M / 32)), or empty; the largest magnitude of the result, (1,), float32.
    """
    return reference(x, up, scale, format)


def reference(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None, format: str
) -> Parts:
    """``activation_quantise`` in torch, on any device."""
    _check(x, up, scale)
    y = _activation(x.float(), None if up is None else up.float())
    amax = y.abs().amax().reshape(1) if y.numel() else y.new_zeros(1)
    if scale is None:
        return (*quantised_pair(y, format, None), amax)
    elements = round_to(y * scale, FORMATS[format], saturate=True).to(storage(format))
    none = torch.empty(0, dtype=torch.uint8, device=x.device)
    return elements, none, elements.t().contiguous(), none.clone(), amax


def _activation(x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.gelu(x) if up is None else torch.nn.functional.silu(x) * up


def _check(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None) -> None:
    if x.dim() != 2 or (up is not None and up.shape != x.shape):
        raise FormatError("activation_quantise takes matrices of one shape")
    if scale is None and x.shape[1] % 32:
        raise FormatError(f"activation_quantise: rows of {x.shape[1]} are no whole blocks of 32")


@activation_quantise.register_fake
def _(x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None, format: str) -> Parts:
    _check(x, up, scale)
    return _outputs(x, scale, format)


def _outputs(x: torch.Tensor, scale: torch.Tensor | None, format: str) -> Parts:
    m, n = x.shape
    fp8 = storage(format)
    codes = ((m, n // 32), (n, (m + 31) // 32)) if scale is None else ((0,), (0,))
    return (
        x.new_empty(m, n, dtype=fp8),
        x.new_empty(codes[0], dtype=torch.uint8),
        x.new_empty(n, m, dtype=fp8),
        x.new_empty(codes[1], dtype=torch.uint8),
        x.new_empty(1, dtype=torch.float32),
    )


@torch.library.custom_op("precision_compiler::activation_backward", mutates_args=())
def activation_backward(
    grad: torch.Tensor, x: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and up from that of y, straight through the rounding.

    GELU: ``Phi(x) + x phi(x)``. SwiGLU with ``s = sigmoid(x)``: ``up s (1 + x (1 - s))`` for x and
    ``x s`` for up. The second result is empty for GELU.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    g, z = grad.to(wide), x.to(wide)
    if up is None:
        density = torch.exp(-0.5 * z.square()) * 0.3989422804014327
        share = 0.5 * (1 + torch.erf(z * 0.7071067811865476))
        return (g * (share + z * density)).to(x.dtype), x.new_empty(0)
    s = torch.sigmoid(z)
    dx = g * up.to(wide) * s * (1 + z * (1 - s))
    return dx.to(x.dtype), (g * z * s).to(up.dtype)


@activation_backward.register_fake
def _(
    grad: torch.Tensor, x: torch.Tensor, up: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(0) if up is None else torch.empty_like(up)


@jit
def activation_kernel(
    x: Value,
    up: Value,
    scale: Value,
    rows: Value,
    row_scales: Value,
    columns: Value,
    column_scales: Value,
    amax: Value,
    M: Value,
    N: Value,
    GATED: constexpr,
    MX: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    SHIFT: constexpr,
    LEAST: constexpr,
    LARGEST: constexpr,
    LARGEST_BITS: constexpr,
    SIGNED_ZERO: constexpr,
) -> None:
    """One program per tile, which is read once and written twice."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (r < M)[:, None] & (c < N)[None, :]
    across = (c < N)[:, None] & (r < M)[None, :]
    at = r.to(tl.int64)[:, None] * N + c[None, :]
    turned = c.to(tl.int64)[:, None] * M + r[None, :]
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if GATED:  # noqa: SIM108 - one line would be too long
        y = silu(y) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    else:
        y = gelu(y)
    tl.atomic_max(amax, tl.max(tl.max(magnitude_bits(y), axis=1), axis=0))
    if MX:
        made, codes = mx_tile(y, ROWS, COLUMNS, SHIFT, LEAST, LARGEST, LARGEST_BITS, SIGNED_ZERO)
        b = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
        where = r.to(tl.int64)[:, None] * (N // 32) + b[None, :]
        tl.store(row_scales + where, codes, mask=(r < M)[:, None] & (b < N // 32)[None, :])
        flipped, codes = mx_tile(
            tl.trans(y), COLUMNS, ROWS, SHIFT, LEAST, LARGEST, LARGEST_BITS, SIGNED_ZERO
        )
        blocks = tl.cdiv(M, 32)
        b = tl.program_id(0) * (ROWS // 32) + tl.arange(0, ROWS // 32)
        where = c.to(tl.int64)[:, None] * blocks + b[None, :]
        tl.store(column_scales + where, codes, mask=(c < N)[:, None] & (b < blocks)[None, :])
    else:
        made = round_to_grid(y * tl.load(scale), SHIFT, LEAST, LARGEST, SIGNED_ZERO)
        flipped = tl.trans(made)
    tl.store(rows + at, made.to(rows.dtype.element_ty), mask=inside)
    tl.store(columns + turned, flipped.to(columns.dtype.element_ty), mask=across)


@activation_quantise.register_kernel("cuda")
def launch(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None, format: str
) -> Parts:
    """``activation_quantise`` by Triton."""
    require_triton()
    _check(x, up, scale)
    x = x.contiguous()
    up = None if up is None else up.contiguous()
    made = _outputs(x, scale, format)
    made[4].zero_()
    m, n = x.shape
    activation_kernel[(triton.cdiv(m, ROWS), triton.cdiv(n, COLUMNS))](
        x, x if up is None else up, made[4] if scale is None else scale,
        *made[:4], made[4].view(torch.int32), m, n,
        GATED=up is not None, MX=scale is None, ROWS=ROWS, COLUMNS=COLUMNS,
        **grid_constants(FORMATS[format]), num_warps=8,
    )  # fmt: skip
    return made


def example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``activation_quantise``: SwiGLU for MX, GELU under a scale of the tensor."""
    m, n = (8192, 14336) if large else (72, 96)
    generator = torch.Generator().manual_seed(2)
    x, up = (torch.randn(m, n, generator=generator).mul(3).bfloat16().to(device) for _ in range(2))
    if format.startswith("mx"):
        return x, up, None, "e4m3"
    return x, None, torch.tensor([16.0], device=device), format


def variants(
    x: torch.Tensor, up: torch.Tensor | None, scale: torch.Tensor | None, format: str
) -> tuple[tuple[Any, ...], ...]:
    """The other activation, with a row of zeros, a huge number and a NaN; SwiGLU at infinity."""
    x = x.float()
    far = torch.ones_like(x)
    far[3, 5] = torch.inf
    gated = (x.clone(), far, scale, format)
    x[0] = 0.0
    x[1, 5], x[2, 7] = 1e37, torch.nan
    return (x, x.flip(0).contiguous() if up is None else None, scale, format), gated


def builds(format: str) -> tuple[Build, ...]:
    """GELU and SwiGLU."""
    mx = format.startswith("mx")
    element = "e4m3" if mx else format
    signature = {"x": pointer("bf16"), "up": pointer("bf16"), "scale": "*fp32"}
    signature |= {"rows": pointer(element), "row_scales": "*u8", "columns": pointer(element)}
    signature |= {"column_scales": "*u8", "amax": "*i32", "M": "i32", "N": "i32"}
    constants = grid_constants(FORMATS[element]) | {"MX": mx, "ROWS": ROWS, "COLUMNS": COLUMNS}
    return tuple(
        Build(name, activation_kernel, signature, constants | {"GATED": gated})
        for name, gated in (("gelu", False), ("swiglu", True))
    )


def work(format: str) -> Work:
    """SwiGLU, 8192 x 14336: two bf16 tensors in, elements out in both orientations."""
    m, n = 8192, 14336
    written = 2 * (1 + (1 / 32 if format.startswith("mx") else 0))
    return Work("8192 x 14336, SwiGLU", 0, m * n * (4 + written), "bf16")


KERNEL = Kernel(
    name="activation_quantise",
    summary="GELU or SwiGLU, scale, quantise; in both orientations, with the largest magnitude",
    formats=("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "mxfp8"),
    matrix=False,
    op=activation_quantise,
    reference=reference,
    launch=launch,
    example=example,
    builds=builds,
    work=work,
    variants=variants,
)
