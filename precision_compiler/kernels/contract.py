"""What every kernel of this folder brings with it, and helpers that their references share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

from precision_compiler.codes import encode
from precision_compiler.elements import E8M0, FORMATS
from precision_compiler.kernels.device import TRITON_TYPES, storage
from precision_compiler.scaled import Quantised, quantise
from precision_compiler.scaling import MX, Scaling


@dataclass(frozen=True)
class Build:
    """One way to compile a kernel ahead of time.

    Attributes:
        name: what is particular about it.
        function: the Triton function.
        signature: Triton type by argument, compile-time arguments left out.
        constants: value by compile-time argument.
        warps: warps of a program.
        stages: stages of the software pipeline.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 8
    stages: int = 3


@dataclass(frozen=True)
class Work:
    """What a kernel does on one typical shape, for the roofline.

    Attributes:
        shape: in words.
        flops: multiplications and additions of matrix products.
        bytes: read from and written to memory, each tensor once.
        format: whose rate counts.
    """

    shape: str
    flops: float
    bytes: float
    format: str


@dataclass(frozen=True)
class Kernel:
    """One kernel with its reference and its test data.

    Attributes:
        name: of its operator in ``torch.ops.precision_compiler``.
        summary: one line on what it does.
        formats: formats it is written for; targets say where it runs in them.
        matrix: whether it must use matrix instructions (otherwise conversions).
        op: the operator: reference on the CPU, Triton on a GPU.
        reference: the same in torch, on any device.
        launch: the same by Triton, which its interpreter also runs on the CPU.
        example: arguments for a format and a device, small or large.
        variants: further arguments made from those, for the kernel's other branches.
        builds: ways to compile it for a format.
        work: bytes and operations on a typical shape in a format.
        tolerance: largest difference from the reference, relative to the largest number.
    """

    name: str
    summary: str
    formats: tuple[str, ...]
    matrix: bool
    op: CustomOpDef
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    example: Callable[[str, str, bool], tuple[Any, ...]]
    builds: Callable[[str], tuple[Build, ...]]
    work: Callable[[str], Work]
    variants: Callable[..., tuple[tuple[Any, ...], ...]] = lambda *given: ()
    tolerance: float = 2.0**-7

    def cases(self, format: str, device: str) -> tuple[tuple[Any, ...], ...]:
        """Small arguments that between them take every branch of the kernel."""
        given = self.example(format, device, False)
        return (given, *self.variants(*given))


def pointer(name: str) -> str:
    """Triton's type of a pointer to elements of a format."""
    return f"*{TRITON_TYPES[name]}"


def stored(made: Quantised) -> tuple[torch.Tensor, torch.Tensor]:
    """Elements in their dtype, and scales: e8m0 codes as uint8 for MX, else float32."""
    elements = made.elements.to(storage(made.fmt.name))
    if made.scaling.scale != "e8m0":
        return elements, made.scales
    return elements, encode(made.scales, E8M0).to(torch.uint8)


def quantised_pair(
    y: torch.Tensor, format: str, row: Scaling | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix and its transpose as stored; the transpose is empty with scales per row.

    Args:
        y: (M, N), float32.
        format: of the elements.
        row: scaling of rows, or None for MX in both orientations.
    """
    fmt = FORMATS[format]
    if row is not None:
        elements, scales = stored(quantise(y, fmt, row))
        return elements, scales.flatten(), elements.new_empty(0), scales.new_empty(0)
    across = y.t().contiguous()
    return (*stored(quantise(y, fmt, MX)), *stored(quantise(across, fmt, MX)))
