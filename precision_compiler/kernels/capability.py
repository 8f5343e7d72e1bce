"""Which kernel runs in which format on which architecture: a plan must not ask for more."""

from dataclasses import dataclass

from precision_compiler.errors import TargetError
from precision_compiler.kernels import (
    activation_quantise,
    block_gemm,
    cross_entropy,
    norm_quantise,
    scaled_gemm,
)
from precision_compiler.kernels.contract import Kernel
from precision_compiler.kernels.targets import Architecture, known_architecture, reason_against
from precision_compiler.target import Target

KERNELS: tuple[Kernel, ...] = (
    norm_quantise.KERNEL,
    activation_quantise.KERNEL,
    scaled_gemm.KERNEL,
    block_gemm.KERNEL,
    cross_entropy.KERNEL,
    cross_entropy.BACKWARD,
)


@dataclass(frozen=True)
class Support:
    """Whether a kernel runs natively; true or false itself.

    Attributes:
        reason: why it does not; empty if it does.
    """

    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


def supports(architecture: str, kernel: str, format: str) -> Support:
    """Whether a kernel has native instructions for a format on an architecture.

    Args:
        architecture: such as "sm_90" or "gfx950".
        kernel: the name of one of KERNELS.
        format: of the operands, or of what is written.

    Raises:
        TargetError: there is no such kernel.
    """
    found = {row.name: row for row in KERNELS}
    if kernel not in found:
        raise TargetError(f"there is no kernel {kernel!r}: choose one of {', '.join(found)}")
    if format not in found[kernel].formats:
        return Support(f"{kernel} is not written for {format}")
    machine = known_architecture(architecture)
    if machine is None:
        name = architecture or "a GPU of unknown architecture"
        return Support(f"kernels are not proved for {name}")
    return Support(reason_against(machine, format, found[kernel].matrix))


def architecture_of(target: Target) -> Architecture | None:
    """The architecture of a target, or None where no kernel was compiled for it."""
    return known_architecture(target.architecture)
