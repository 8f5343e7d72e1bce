"""How long one matrix product takes on a target: a few physical terms, no table of shapes.

A product of an m x k and a k x n matrix is cut into output tiles, which the target's units (GPU
multiprocessors) work off in waves. Seconds of the product itself:

    max(waves * seconds of a tile, traffic) + result traffic of the last wave + one kernel

1. Tiles: the best of a few shapes; a unit is busy for ``waves`` whole tiles, so the last wave may
   be nearly empty. A tile below 128 x 256 re-reads operands too often to keep its unit busy.
2. Rate: ``achieved_fraction`` of the peak, falling to ``sustained_fraction`` of that as the
   product lasts longer than the power controller needs to lower the clock.
3. Splitting k over several units fills an empty machine, and costs the traffic of float32
   partial sums.
4. Traffic: both operands from memory once, or the wider one once per pass over the narrower one
   where the last-level cache cannot hold that; the result once, a tile's when it is computed, so
   the last wave's when there is nothing left to compute.
5. Every kernel costs its launch, and the time until its units are all busy or all idle.

Quantising an operand is streaming kernels of their own, see ``quantise_seconds``.
"""

from dataclasses import dataclass
from math import ceil, exp, inf, prod, sqrt
from typing import TYPE_CHECKING

from precision_compiler.errors import TargetError
from precision_compiler.format_rates import FormatRate, Quantisation
from precision_compiler.gemm_formats import GEMM_BYTES, nearest

if TYPE_CHECKING:
    from precision_compiler.target import Target

SCALINGS = ("none", "tensor", "delayed", "row", "block")
"""How the scale of a narrow operand is found: not at all; from the tensor now; from earlier
steps; from each row; from each block of elements along k."""

_TILES = ((256, 256), (256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
_FULL_TILE = 128 * 256 / (128 + 256)
"""Multiply-adds per loaded element, along k, of the tile that keeps a unit busy."""
_INSIDE = 1.11
"""Rate of a busy unit over that of the best published whole product, which pays for its last wave,
its kernel and its falling clock too; fitted to the published maxima (benchmarks/data/gemm_mamf)."""
_SPLITS = (1, 2, 3, 4, 6, 8)
_SHORTEST_SPLIT = 512
"""Elements of k that the smallest part of a split takes as long as."""
_POWER_WINDOW = 0.7e-3
"""Seconds in which a power controller settles; fitted to the published B300 forward products."""
_CACHE_SHARE = 0.5
"""Share of the last-level cache that one operand's panel can keep while the rest streams by."""
_SOURCE_BYTES = 2
"""Bytes of an element before it is quantised (bf16)."""
_WIDE_BYTES = 2
"""Operands of at least this width are not quantised."""


@dataclass(frozen=True)
class Product:
    """The sizes of ``batch`` products m x k times k x n, padded to what kernels take."""

    m: int
    n: int
    k: int
    batch: int = 1

    def padded(self, rate: FormatRate) -> "Product":
        """Sizes rounded up to the multiples that the format's kernels require."""
        return Product(
            _up(self.m, rate.multiple_m),
            _up(self.n, rate.multiple_n),
            _up(self.k, rate.multiple_k),
            self.batch,
        )


def gemm_seconds(
    target: "Target", product: Product, name: str, scaling: str, quantise: bool
) -> float:
    """Seconds of a product with operands in format ``name``, quantised before it or not.

    Quantised operands are the two of a training step's forward product: the left one is also
    stored along its other axis, for the product that gives the weight's gradient, where the
    format needs that. See ``Target.gemm_seconds`` for the arguments.
    """
    rate = _checked(target, product, name, scaling)
    scaling = "block" if rate.block else scaling
    sizes = product.padded(rate)
    seconds = product_seconds(target, sizes, name, rate, scaling)
    if quantise and GEMM_BYTES[name] < _WIDE_BYTES:
        left, right = sizes.m * sizes.k * sizes.batch, sizes.k * sizes.n * sizes.batch
        twice = rate.layouts == "tn" or scaling in ("row", "block")
        seconds += quantise_seconds(target, left, name, scaling, twice=twice)
        seconds += quantise_seconds(target, right, name, scaling, twice=False)
    return seconds


def product_seconds(
    target: "Target", sizes: Product, name: str, rate: FormatRate, scaling: str
) -> float:
    """Seconds of the product alone, on operands that are in the format already."""
    width = GEMM_BYTES[name]
    if target.units is None:
        return target.roofline_seconds(*_totals(sizes, width), rate)
    per_unit = (
        _INSIDE * rate.flops / target.units * (rate.block_fraction if scaling == "block" else 1.0)
    )
    operands = target.stream_seconds(_operand_bytes(target, sizes, width, rate))
    best = inf
    for tile in _TILES:
        for split in _SPLITS:
            busy = _wave_seconds(target.units, sizes, tile, split, per_unit)
            size = _result_bytes(sizes, width, split)
            result = target.stream_seconds(size)
            last = target.stream_seconds(
                min(size, target.units * prod(tile) * _result_width(width))
            )
            best = min(best, max(_throttled(busy, target), operands + result) + last)
    return best + target.kernel_seconds


def quantise_seconds(
    target: "Target",
    elements: int,
    name: str,
    scaling: str,
    *,
    twice: bool,
    joined: bool = False,
    source_bytes: float = _SOURCE_BYTES,
) -> float:
    """Seconds of quantising ``elements`` numbers, also along the other axis if ``twice``.

    Passes over memory, as kernels of TransformerEngine and torchao make them: a read for the
    amax where scales are not known beforehand; one read and one write per copy for the cast, with
    the scales; whatever a second copy along the other axis moves. Where a kernel before that
    makes the numbers can do the first pass on them (``joined``), one read and one kernel less.
    ``source_bytes`` are those of an element as it is read, 2 by default (bf16).
    """
    rate, passes = target.rate(name), target.quantisation(scaling)
    copies = 2 if twice else 1
    scale = rate.scale_bytes / rate.block if rate.block else _scale_bytes(passes)
    reads, kernels = 1 + passes.amax_reads - joined, passes.kernels - joined
    if rate.tensor_scale:
        reads += 1
        kernels += rate.tensor_scale_kernels
    size = source_bytes * reads + copies * (GEMM_BYTES[name] + scale)
    if twice:
        size += passes.copy_bytes
        kernels += passes.copy_kernels
    stream = elements * size / (target.bandwidth * target.cast_fraction)
    return stream + kernels * target.issue_seconds


def _wave_seconds(
    units: int, sizes: Product, tile: tuple[int, int], split: int, flops: float
) -> float:
    """Seconds of all waves, at ``flops`` FLOP/s of a unit on a full tile."""
    rows, columns = tile
    count = ceil(sizes.m / rows) * ceil(sizes.n / columns) * split * sizes.batch
    busy = sqrt(min(1.0, rows * columns / (rows + columns) / _FULL_TILE))
    depth = sizes.k if split == 1 else max(ceil(sizes.k / split), _SHORTEST_SPLIT)
    return ceil(count / units) * 2 * rows * columns * depth / (flops * busy)


def _throttled(seconds: float, target: "Target") -> float:
    """Seconds at a clock that falls while the product runs (rule 2)."""
    settled = 1 - exp(-seconds / _POWER_WINDOW)
    return seconds * (1 + (1 / target.sustained_fraction - 1) * settled)


def _operand_bytes(target: "Target", sizes: Product, width: float, rate: FormatRate) -> float:
    """Bytes of operands from memory (rule 4), scales included."""
    width += rate.scale_bytes / rate.block if rate.block else 0.0
    left, right = sizes.m * sizes.k * width, sizes.k * sizes.n * width
    narrow, wide = min(left, right), max(left, right)
    passes = max(1, ceil(narrow / (_CACHE_SHARE * target.cache))) if target.cache else 1
    return sizes.batch * (narrow + wide * passes)


def _result_bytes(sizes: Product, width: float, split: int) -> float:
    """Bytes of the result, and of float32 partial sums written and read where k is split."""
    partial = 8 * split if split > 1 else 0
    return sizes.batch * sizes.m * sizes.n * (_result_width(width) + partial)


def _totals(sizes: Product, width: float) -> tuple[float, float]:
    """Floating-point operations, and bytes moved if everything is moved once."""
    operands = sizes.m * sizes.k + sizes.k * sizes.n
    size = sizes.batch * (width * operands + _result_width(width) * sizes.m * sizes.n)
    return 2.0 * sizes.batch * sizes.m * sizes.n * sizes.k, size


def _result_width(width: float) -> float:
    """Bytes of an element of the result: narrow formats accumulate into 16 bits."""
    return max(width, 2.0)


def _scale_bytes(passes: Quantisation) -> float:
    """Bytes of scales per element where the scaling mode, not the format, fixes the block."""
    return 4 / passes.block if passes.block else 0.0


def _up(size: int, multiple: int) -> int:
    return ceil(size / multiple) * multiple


def _checked(target: "Target", product: Product, name: str, scaling: str) -> FormatRate:
    """The format's row, or an error that names the argument and what would work."""
    for key, size in vars(product).items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise TargetError(f"{key}: {size!r} is no size; give an integer of 1 or more")
    if name not in GEMM_BYTES:
        raise TargetError(f"format: unknown format {name!r}{nearest(name, GEMM_BYTES)}")
    if scaling not in SCALINGS:
        raise TargetError(f"scaling: unknown scaling {scaling!r}{nearest(scaling, SCALINGS)}")
    rate = target.rate(name)
    if rate.block and scaling not in ("none", "block"):
        raise TargetError(
            f"scaling: {name} carries a scale per {rate.block} elements; use none or block, not "
            f"{scaling}"
        )
    return rate
