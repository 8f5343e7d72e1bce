"""Kernel: LayerNorm or RMSNorm, scale and quantise, in both orientations.

    y = (x - mean) / sqrt(var + eps) * weight + bias      LayerNorm
    y = x / sqrt(mean(x^2) + eps) * weight                RMSNorm

What a product sums over decides along which axis blocks lie, so the forward product wants ``y``
with blocks along its columns and the weight's gradient wants it transposed with blocks along its
rows. Both are written from the same tile. Statistics, which the backward pass needs, are kept.
"""

from typing import Any

import torch

from precision_compiler.elements import FORMATS
from precision_compiler.errors import FormatError
from precision_compiler.kernels.contract import (
    Build,
    Kernel,
    Work,
    pointer,
    quantised_pair,
)
from precision_compiler.kernels.device import (
    grid_constants,
    magnitude_bits,
    mx_tile,
    power,
    round_to_grid,
    scale_exponent,
    storage,
)
from precision_compiler.kernels.language import Value, constexpr, jit, require_triton, tl, triton
from precision_compiler.scaling import ROW

ROWS, COLUMNS = 32, 128
LONGEST_ROW = 16384
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("precision_compiler::norm_quantise", mutates_args=())
def norm_quantise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: str,
    scaling: str,
) -> Parts:
    """Normalise rows and quantise them.

    Args:
        x: (M, N), float32, bf16 or fp16; N a multiple of 32 for "mx", at most 16384 for "row".
        weight: (N,).
        bias: (N,) or None.
        eps: added to the variance.
        centred: LayerNorm if True, RMSNorm if False.
        format: of the elements, an 8-bit one.
        scaling: "mx" (1x32, e8m0 codes as uint8, both orientations) or "row" (a power of two per
            row, float32; the other orientation is left empty, as its scales need every row).

    Returns:
        Elements (M, N) and scales (M, N / 32) or (M,); transposed elements (N, M) and scales
        (N, ceil(M / 32)), or empty; mean (M,), empty for RMSNorm; reciprocal deviation (M,).
    """
    return reference(x, weight, bias, eps, centred, format, scaling)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: str,
    scaling: str,
) -> Parts:
    """``norm_quantise`` in torch, on any device."""
    _check(x, scaling)
    wide = x.float()
    mean = wide.mean(1) if centred else wide.new_empty(0)
    off = wide - mean[:, None] if centred else wide
    deviation = torch.sqrt(off.square().mean(1) + eps).reciprocal()
    y = off * deviation[:, None] * weight.float()
    y = y if bias is None else y + bias.float()
    return (*quantised_pair(y, format, ROW if scaling == "row" else None), mean, deviation)


@norm_quantise.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: str,
    scaling: str,
) -> Parts:
    _check(x, scaling)
    return _outputs(x, centred, format, scaling)


def _check(x: torch.Tensor, scaling: str) -> None:
    if x.dim() != 2 or scaling not in ("mx", "row"):
        raise FormatError(f"norm_quantise takes a matrix and mx or row, not {x.dim()}d, {scaling}")
    if scaling == "mx" and x.shape[1] % 32:
        raise FormatError(f"norm_quantise: rows of {x.shape[1]} are no whole blocks of 32")
    if scaling == "row" and x.shape[1] > LONGEST_ROW:
        raise FormatError(f"norm_quantise: rows of {x.shape[1]}, with row scales up to 16384")


def _outputs(x: torch.Tensor, centred: bool, format: str, scaling: str) -> Parts:
    m, n = x.shape
    mx = scaling == "mx"
    fp32, fp8 = torch.float32, storage(format)
    return (
        x.new_empty(m, n, dtype=fp8),
        x.new_empty((m, n // 32), dtype=torch.uint8) if mx else x.new_empty(m, dtype=fp32),
        x.new_empty((n, m) if mx else (0,), dtype=fp8),
        x.new_empty((n, (m + 31) // 32), dtype=torch.uint8) if mx else x.new_empty(0, dtype=fp32),
        x.new_empty(m if centred else 0, dtype=fp32),
        x.new_empty(m, dtype=fp32),
    )


@torch.library.custom_op("precision_compiler::norm_backward", mutates_args=())
def norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, weight and bias from that of y, straight through the rounding.

    With ``h = (x - mean) * r`` and ``g = grad * weight``: ``dx = r (g - mean(g) - h mean(g h))``,
    without ``mean(g)`` for RMSNorm, whose ``mean`` is empty. Shapes as in ``norm_quantise``.
    A product of its own: an fp8 output cannot carry a wide gradient through autograd.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    off = x.to(wide) - mean[:, None] if mean.numel() else x.to(wide)
    h = off * deviation[:, None]
    g = grad.to(wide) * weight.to(wide)
    dx = g - h * (g * h).mean(1, keepdim=True)
    if mean.numel():
        dx = dx - g.mean(1, keepdim=True)
    dx = (dx * deviation[:, None]).to(x.dtype)
    return dx, (grad * h).sum(0).to(weight.dtype), grad.to(wide).sum(0).to(weight.dtype)


@norm_backward.register_fake
def _(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    deviation: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


@jit
def row_kernel(
    x: Value,
    weight: Value,
    bias: Value,
    rows: Value,
    row_scales: Value,
    means: Value,
    deviations: Value,
    N: Value,
    eps: Value,
    CENTRED: constexpr,
    BIASED: constexpr,
    BLOCK: constexpr,
    SHIFT: constexpr,
    LEAST: constexpr,
    LARGEST: constexpr,
    LARGEST_BITS: constexpr,
    SIGNED_ZERO: constexpr,
) -> None:
    """One program per row, which it holds whole: one read, one write."""
    row = tl.program_id(0)
    start = row.to(tl.int64) * N
    columns = tl.arange(0, BLOCK)
    inside = columns < N
    off = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(off, axis=0) / N
        tl.store(means + row, mean)
        off = tl.where(inside, off - mean, 0.0)
    deviation = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(off * off, axis=0) / N + eps))
    tl.store(deviations + row, deviation)
    y = off * deviation * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        y += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(magnitude_bits(y), axis=0)
    exponent = tl.maximum(scale_exponent(amax, LARGEST_BITS), 1)
    exponent = tl.where((amax > 0) & (amax < 0x7F800000), exponent, 127)
    tl.store(row_scales + row, power(exponent))
    made = round_to_grid(y * power(254 - exponent), SHIFT, LEAST, LARGEST, SIGNED_ZERO)
    tl.store(rows + start + columns, made.to(rows.dtype.element_ty), mask=inside)


@jit
def mx_kernel(
    x: Value,
    weight: Value,
    bias: Value,
    rows: Value,
    row_scales: Value,
    columns: Value,
    column_scales: Value,
    means: Value,
    deviations: Value,
    M: Value,
    N: Value,
    eps: Value,
    CENTRED: constexpr,
    BIASED: constexpr,
    ROWS: constexpr,
    COLUMNS: constexpr,
    SHIFT: constexpr,
    LEAST: constexpr,
    LARGEST: constexpr,
    LARGEST_BITS: constexpr,
    SIGNED_ZERO: constexpr,
) -> None:
    """One program per 32 rows: statistics first, then each tile is read once and written twice.

    The second read of ``x`` comes from the L2 cache: 32 rows are 64 N bytes of bf16. Statistics
    of tiles are joined as Chan, Golub and LeVeque do (1979).
    """
    group = tl.program_id(0)
    r = group * ROWS + tl.arange(0, ROWS)
    start = r.to(tl.int64)[:, None] * N
    mean = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for first in range(0, N, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (r < M)[:, None] & (c < N)[None, :]
        tile = tl.load(x + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
        if CENTRED:
            count = tl.minimum(N - first, COLUMNS).to(tl.float32)
            part = tl.sum(tile, axis=1) / count
            apart = tl.where(inside, tile - part[:, None], 0.0)
            step = part - mean
            squares += tl.sum(apart * apart, axis=1) + step * step * (
                first * count / (first + count)
            )
            mean += step * (count / (first + count))
        else:
            squares += tl.sum(tile * tile, axis=1)
    deviation = tl.div_rn(1.0, tl.sqrt_rn(squares / N + eps))
    tl.store(deviations + r, deviation, mask=r < M)
    if CENTRED:
        tl.store(means + r, mean, mask=r < M)
    for first in range(0, N, COLUMNS):
        c = first + tl.arange(0, COLUMNS)
        inside = (r < M)[:, None] & (c < N)[None, :]
        tile = tl.load(x + start + c[None, :], mask=inside, other=0.0).to(tl.float32)
        y = (tile - mean[:, None]) * deviation[:, None]
        y *= tl.load(weight + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
        if BIASED:
            y += tl.load(bias + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
        y = tl.where(inside, y, 0.0)
        made, codes = mx_tile(y, ROWS, COLUMNS, SHIFT, LEAST, LARGEST, LARGEST_BITS, SIGNED_ZERO)
        tl.store(rows + start + c[None, :], made.to(rows.dtype.element_ty), mask=inside)
        b = first // 32 + tl.arange(0, COLUMNS // 32)
        at = r.to(tl.int64)[:, None] * (N // 32) + b[None, :]
        tl.store(row_scales + at, codes, mask=(r < M)[:, None] & (b < N // 32)[None, :])
        made, codes = mx_tile(
            tl.trans(y), COLUMNS, ROWS, SHIFT, LEAST, LARGEST, LARGEST_BITS, SIGNED_ZERO
        )
        at = c.to(tl.int64)[:, None] * M + r[None, :]
        across = (c < N)[:, None] & (r < M)[None, :]
        tl.store(columns + at, made.to(columns.dtype.element_ty), mask=across)
        at = c.to(tl.int64)[:, None] * tl.cdiv(M, 32) + group + tl.arange(0, 1)[None, :]
        tl.store(column_scales + at, codes, mask=(c < N)[:, None])


@norm_quantise.register_kernel("cuda")
def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    centred: bool,
    format: str,
    scaling: str,
) -> Parts:
    """``norm_quantise`` by Triton."""
    require_triton()
    _check(x, scaling)
    x = x.contiguous()
    made = _outputs(x, centred, format, scaling)
    rows, row_scales, columns, column_scales, means, deviations = made
    m, n = x.shape
    fixed = {"CENTRED": centred, "BIASED": bias is not None, "num_warps": 8}
    fixed |= grid_constants(FORMATS[format])
    given = (x, weight, weight if bias is None else bias, rows, row_scales)
    if scaling == "row":
        block = triton.next_power_of_2(n)
        row_kernel[(m,)](*given, means, deviations, n, eps, BLOCK=block, **fixed)
    else:
        mx_kernel[(triton.cdiv(m, ROWS),)](
            *given, columns, column_scales, means, deviations, m, n, eps,
            ROWS=ROWS, COLUMNS=COLUMNS, **fixed,
        )  # fmt: skip
    return made


def example(format: str, device: str, large: bool) -> tuple[Any, ...]:
    """Arguments of ``norm_quantise``: rows of all sizes, an outlier, a row of equal numbers."""
    m, n = (8192, 4096) if large else (40, 160)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(m, n, generator=generator) * torch.logspace(-2, 2, m)[:, None]
    x[1, 3] = 300.0
    x[2] = 0.5
    weight = torch.randn(n, generator=generator)
    bias = torch.randn(n, generator=generator)
    scaling = "mx" if format.startswith("mx") else "row"
    element = "e4m3" if scaling == "mx" else format
    moved = (x.bfloat16().to(device), weight.to(device), bias.to(device))
    return (*moved, 1e-5, True, element, scaling)


def variants(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, *rest: Any
) -> tuple[tuple[Any, ...], ...]:
    """RMSNorm, in float32, and LayerNorm without a bias."""
    _, *kind = rest
    return (x.float(), weight, None, eps, False, *kind), (x, weight, None, eps, True, *kind)


def builds(format: str) -> tuple[Build, ...]:
    """LayerNorm and RMSNorm of rows of 4096."""
    mx = format.startswith("mx")
    element = "e4m3" if mx else format
    narrow = pointer(element)
    signature = {"x": pointer("bf16"), "weight": pointer("fp32"), "bias": pointer("fp32")}
    if mx:
        signature |= {"rows": narrow, "row_scales": "*u8", "columns": narrow}
        signature |= {"column_scales": "*u8", "means": "*fp32", "deviations": "*fp32"}
        signature |= {"M": "i32", "N": "i32", "eps": "fp32"}
        sizes = {"ROWS": ROWS, "COLUMNS": COLUMNS}
    else:
        signature |= {"rows": narrow, "row_scales": "*fp32", "means": "*fp32"}
        signature |= {"deviations": "*fp32", "N": "i32", "eps": "fp32"}
        sizes = {"BLOCK": 4096}
    constants = grid_constants(FORMATS[element]) | sizes
    function = mx_kernel if mx else row_kernel
    return tuple(
        Build(name, function, signature, constants | {"CENTRED": centred, "BIASED": centred})
        for name, centred in (("layer norm", True), ("rms norm", False))
    )


def work(format: str) -> Work:
    """8192 x 4096: bf16 in, elements out, for MX twice with a scale for every 32."""
    m, n = 8192, 4096
    written = 2 * (1 + 1 / 32) if format.startswith("mx") else 1
    return Work("8192 x 4096", 0, m * n * (2 + written), "bf16")


KERNEL = Kernel(
    name="norm_quantise",
    summary="LayerNorm or RMSNorm, scale, quantise; MX in both orientations",
    formats=("e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "mxfp8"),
    matrix=False,
    op=norm_quantise,
    reference=reference,
    launch=launch,
    example=example,
    builds=builds,
    work=work,
    variants=variants,
)
