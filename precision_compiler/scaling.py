"""Which elements of a tensor share a scale, and what the scale is: data, and formats made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from precision_compiler.elements import FORMATS, Format
from precision_compiler.errors import FormatError

Granularity = Literal["none", "tensor", "row", "block", "block2d"]
ScaleFormat = Literal["power_of_two", "fp32", "e8m0", "e4m3"]

SCALE_BITS: Mapping[ScaleFormat, int] = MappingProxyType(
    {"power_of_two": 32, "fp32": 32, "e8m0": 8, "e4m3": 8}
)
"""Storage of one scale: powers of two for tensors, rows and tiles are kept as float32."""
_SCALE_DTYPES: Mapping[ScaleFormat, torch.dtype] = MappingProxyType(
    {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
)


@dataclass(frozen=True)
class Scaling:
    """How a tensor is scaled before its elements are rounded.

    Attributes:
        granularity: who shares a scale: nobody has one ("none"), the whole tensor, a row (all
            elements along the axis that is summed over), ``size`` neighbours along that axis
            ("block"), or ``size`` by ``size`` neighbours in the last two dimensions ("block2d").
        scale: "power_of_two" and "fp32" make the largest magnitude the format's largest number,
            the first at most; "e8m0" is the shared exponent of MX formats; "e4m3" the block scale
            of NVFP4, relative to a float32 scale of the tensor.
        size: elements of a block along each of its axes; 0 for the other granularities.
        rounding: of a power of two: "up" so that nothing saturates, or "floor" as the OCP MX
            specification has it, where the largest elements of a block may saturate.

    Raises:
        FormatError: the size does not go with the granularity.
    """

    granularity: Granularity
    scale: ScaleFormat = "power_of_two"
    size: int = 0
    rounding: Literal["up", "floor"] = "up"

    def __post_init__(self) -> None:
        if self.granularity in ("block", "block2d") and self.size < 1:
            raise FormatError(f"{self.granularity} scaling needs the size of a block")
        if self.granularity not in ("block", "block2d") and self.size:
            raise FormatError(f"{self.granularity} scaling has no blocks, so no size of a block")
        if self.rounding == "floor" and self.scale not in ("power_of_two", "e8m0"):
            raise FormatError(f"{self.scale} scales are not rounded to a power of two")

    @property
    def bits(self) -> float:
        """Storage of scales per element, in bits; that of whole tensors and rows is left out."""
        power = {"block": 1, "block2d": 2}.get(self.granularity)
        return SCALE_BITS[self.scale] / self.size**power if power else 0.0


NONE = Scaling("none")
TENSOR = Scaling("tensor")
TENSOR_FP32 = Scaling("tensor", "fp32")
ROW = Scaling("row")
ROW_FP32 = Scaling("row", "fp32")
BLOCK_1X128 = Scaling("block", size=128)
BLOCK_1X128_FP32 = Scaling("block", "fp32", 128)
BLOCK_128X128 = Scaling("block2d", size=128)
BLOCK_128X128_FP32 = Scaling("block2d", "fp32", 128)
MX = Scaling("block", "e8m0", 32)
MX_FLOOR = Scaling("block", "e8m0", 32, "floor")
NVFP4 = Scaling("block", "e4m3", 16)
NVFP4_2D = Scaling("block2d", "e4m3", 16)

SCALINGS: Mapping[str, Scaling] = MappingProxyType(
    {
        "none": NONE,
        "tensor": TENSOR,
        "tensor_fp32": TENSOR_FP32,
        "row": ROW,
        "row_fp32": ROW_FP32,
        "1x128": BLOCK_1X128,
        "1x128_fp32": BLOCK_1X128_FP32,
        "128x128": BLOCK_128X128,
        "128x128_fp32": BLOCK_128X128_FP32,
        "mx": MX,
        "mx_floor": MX_FLOOR,
        "nvfp4": NVFP4,
        "nvfp4_2d": NVFP4_2D,
    }
)
"""The scalings in use, by name."""


Rounding = Literal["nearest", "stochastic"]
Content = Literal["weight", "activation", "gradient"]
"""What an operand of a product is: recipes treat them differently."""


@dataclass(frozen=True)
class ScaledFormat:
    """A format of whole tensors: elements of one format under one scaling.

    Recipes are further ways to make operands for the matrix instructions of a format: other
    scales, stochastic rounding of gradients, operands that are rotated before they are rounded.

    Attributes:
        name: the word for it in plans and targets.
        element: format of the elements.
        scaling: which of them share a scale, and which scale.
        weight_scaling: scaling of weights where it differs.
        base: of a recipe, the format whose instructions multiply it; "" for a format itself.
        gradients: rounding of operands that depend on the loss's gradient; all others are
            rounded to nearest.
        rotated: whether both operands are multiplied by a Hadamard matrix along the summed axis.
        roles: of the products that the recipe is for; all of them if empty.
    """

    name: str
    element: Format
    scaling: Scaling
    weight_scaling: Scaling | None = None
    base: str = ""
    gradients: Rounding = "nearest"
    rotated: bool = False
    roles: tuple[str, ...] = ()

    def scaling_of(self, content: Content) -> Scaling:
        """Scaling of an operand."""
        if content == "weight" and self.weight_scaling is not None:
            return self.weight_scaling
        return self.scaling

    @property
    def bits(self) -> float:
        """Storage of one element in bits, its share of the scales included."""
        return self.element.bits + self.scaling.bits

    @property
    def bytes(self) -> float:
        """Bytes of one stored element, its share of the scales included."""
        return self.bits / 8

    @property
    def element_dtype(self) -> torch.dtype | None:
        """The torch dtype of stored elements, pairs of 4 bits in one; None where torch has none."""
        pairs = torch.float4_e2m1fn_x2 if self.element.bits == 4 else None
        return self.element.dtype or pairs

    @property
    def scale_dtype(self) -> torch.dtype:
        """The torch dtype of a stored scale."""
        return _SCALE_DTYPES.get(self.scaling.scale, torch.float32)


_ROWS = (
    ScaledFormat("mxfp8", FORMATS["e4m3"], MX),
    ScaledFormat("mxfp8e5m2", FORMATS["e5m2"], MX),
    ScaledFormat("mxfp6", FORMATS["e2m3"], MX),
    ScaledFormat("mxfp6e3m2", FORMATS["e3m2"], MX),
    ScaledFormat("mxfp4", FORMATS["e2m1"], MX),
    ScaledFormat("nvfp4", FORMATS["e2m1"], NVFP4),
    # torchao's and FBGEMM's rowwise fp8; DeepSeek-V3's blocks; NVIDIA's NVFP4 pretraining; Tseng
    # et al., Training LLMs with MXFP4 (2025)
    ScaledFormat("e4m3_row", FORMATS["e4m3"], ROW_FP32, base="e4m3"),
    ScaledFormat("e4m3_1x128", FORMATS["e4m3"], BLOCK_1X128_FP32, BLOCK_128X128_FP32, "e4m3"),
    ScaledFormat(
        "nvfp4_2d",
        FORMATS["e2m1"],
        NVFP4,
        NVFP4_2D,
        "nvfp4",
        "stochastic",
        roles=("fprop", "dgrad"),
    ),
    ScaledFormat(
        "nvfp4_sr", FORMATS["e2m1"], NVFP4, None, "nvfp4", "stochastic", roles=("dgrad", "wgrad")
    ),
    ScaledFormat(
        "nvfp4_rht", FORMATS["e2m1"], NVFP4, None, "nvfp4", "stochastic", True, ("wgrad",)
    ),
    ScaledFormat(
        "mxfp4_sr", FORMATS["e2m1"], MX, None, "mxfp4", "stochastic", roles=("dgrad", "wgrad")
    ),
    ScaledFormat("mxfp4_rht", FORMATS["e2m1"], MX, None, "mxfp4", "stochastic", True, ("wgrad",)),
)

SCALED_FORMATS: Mapping[str, ScaledFormat] = MappingProxyType({row.name: row for row in _ROWS})
"""Every format with scales of rows or blocks, and every recipe, by name."""

ROTATED = 16
"""Elements along the summed axis that a rotation mixes."""

RECIPES = tuple(row.name for row in _ROWS if row.base)
"""Those that are further ways to use the instructions of a format."""


def hardware_format(name: str) -> str:
    """The format whose matrix instructions a format or recipe uses."""
    row = SCALED_FORMATS.get(name)
    return row.base if row is not None and row.base else name


def is_stochastic(name: str) -> bool:
    """Whether a format or recipe rounds gradients stochastically."""
    row = SCALED_FORMATS.get(name)
    return row is not None and row.gradients == "stochastic"


def suits(name: str, role: str) -> bool:
    """Whether a format or recipe is meant for products of a role."""
    row = SCALED_FORMATS.get(name)
    return row is None or not row.roles or role in row.roles


def reason_against_recipe(name: str, role: str, length: int) -> str:
    """Why a format or recipe is not for a product; empty if it is.

    Args:
        name: of the format or recipe.
        role: of the product.
        length: of its sum.
    """
    row = SCALED_FORMATS.get(name)
    if row is None:
        return ""
    if not suits(name, role):
        return f"{name} is a recipe for {' and '.join(row.roles)}"
    if row.rotated and length % ROTATED:
        return f"the sum over {length} elements does not divide into tiles of {ROTATED}"
    if row.base and row.scaling.scale == "fp32" and length <= row.scaling.size:
        return "one block is the whole row, which has a recipe of its own"
    return ""


def scaled_format_named(name: str) -> ScaledFormat:
    """Return the format or recipe called ``name``, or an element format under its usual scaling.

    Formats that need a scale are scaled per tensor by a power of two, the others not at all.

    Raises:
        FormatError: there is no such format; the message lists those there are.
    """
    if name in SCALED_FORMATS:
        return SCALED_FORMATS[name]
    if name in FORMATS:
        return ScaledFormat(name, FORMATS[name], TENSOR if FORMATS[name].scaled else NONE)
    known = ", ".join((*FORMATS, *SCALED_FORMATS))
    raise FormatError(f"unknown format {name!r}: choose one of {known}")
