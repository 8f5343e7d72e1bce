"""Rows of a target: how fast it multiplies in a format, and what quantising to it takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pydantic import ConfigDict

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FormatRate:
    """How fast contractions run with operands in one format.

    Attributes:
        peak_flops: dense peak in FLOP/s, float32 accumulation.
        achieved_fraction: largest fraction of the peak that large matmuls reach.
        confidence: "good", or "weak" where the number rests on memory or one secondary page.
        source: where the numbers come from.
        accumulate: format of the running sum of products.
        accumulate_every: products added exactly before the sum is rounded to it.
        note: caveats of the hardware in words; nothing is computed from it.
        multiple_m, multiple_n, multiple_k: sizes are multiples of so many elements; m and n of
            the result, k of the contraction (rules of cuBLASLt, torch._scaled_mm and
            TransformerEngine; the matrix unit's side on TPU and Trainium).
        block: elements along k that share one scale; 0 if the format has no block scales.
        scale_bytes: of the scale of a block.
        tensor_scale: whether there is a scale per tensor beside those of blocks (NVFP4).
        tensor_scale_kernels: kernels that find that scale.
        layouts: "any", or "tn" where both operands must be contiguous along k.
        block_fraction: rate with scales per block of k that the matrix units do not apply
            themselves, relative to one scale per tensor.
    """

    __pydantic_config__ = _STRICT

    peak_flops: float
    achieved_fraction: float
    source: str
    confidence: Literal["good", "weak"] = "good"
    accumulate: str = "fp32"
    accumulate_every: int = 1
    note: str = ""
    multiple_m: int = 1
    multiple_n: int = 1
    multiple_k: int = 1
    block: int = 0
    scale_bytes: float = 0.0
    tensor_scale: bool = False
    tensor_scale_kernels: int = 3
    layouts: Literal["any", "tn"] = "any"
    block_fraction: float = 1.0

    @property
    def flops(self) -> float:
        """Rate that large matmuls reach, FLOP/s."""
        return self.peak_flops * self.achieved_fraction


@dataclass(frozen=True)
class Quantisation:
    """What quantising one bf16 tensor moves and starts, for one way to find scales.

    Attributes:
        amax_reads: reads of the tensor for its largest magnitudes, before the cast reads it.
        kernels: kernels in all.
        copy_bytes: bytes per element that a second copy, along the other axis, moves beside
            being written: 0 where the cast's kernel writes both.
        copy_kernels: further kernels for it.
        block: elements that share a float32 scale; 0 where scales are too few to matter.
    """

    __pydantic_config__ = _STRICT

    amax_reads: int
    kernels: int
    copy_bytes: float = 0.0
    copy_kernels: int = 0
    block: int = 0


QUANTISATIONS: Mapping[str, Quantisation] = MappingProxyType(
    {
        "none": Quantisation(amax_reads=0, kernels=1),
        "tensor": Quantisation(amax_reads=1, kernels=4),  # clear, amax, scale, cast
        "delayed": Quantisation(amax_reads=0, kernels=1),
        "row": Quantisation(amax_reads=0, kernels=1, copy_bytes=4.0, copy_kernels=1),
        "block": Quantisation(amax_reads=0, kernels=2, block=128),  # cast, arrange scales
    }
)
"""By scaling, as TransformerEngine's kernels work, rowwise as torchao's do (roofline_utils)."""
