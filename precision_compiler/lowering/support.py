"""Which products in which formats some kernel runs, and on which GPU."""

import torch
from torch import fx

from precision_compiler.errors import TargetError
from precision_compiler.formats import CHOICES
from precision_compiler.graph import aten, is_matrix_product
from precision_compiler.kernels.targets import (
    ARCHITECTURES,
    architecture_named,
    reason_against,
    this_architecture,
)
from precision_compiler.target import Target

_TWO_MATRICES = (aten.mm.default, aten.addmm.default)


def reason_against_product(node: fx.Node, fmt: str, architecture: str) -> str:
    """Why no kernel runs a contraction in a format; empty if one does, or it is not known.

    Args:
        node: the contraction.
        fmt: of its operands.
        architecture: such as "sm_90"; one that is not in the kernels' table is taken at its word.
    """
    if fmt == "tf32" and not is_matrix_product(node):
        return "tf32 can be asked for of products of matrices alone"
    if not CHOICES[fmt].scaled:
        return ""
    if node.target not in _TWO_MATRICES:
        return "scales are for products of two matrices, not attention, batches or convolutions"
    if not any(fmt in machine.matrix for machine in ARCHITECTURES):
        return f"no kernel multiplies {fmt}: neither torch nor Triton has its products"
    try:
        machine = architecture_named(architecture)
    except TargetError:
        return ""
    return reason_against(machine, fmt, matrix=True)


def architecture_for(target: str) -> str:
    """What graphs are lowered for: the GPU at hand, or without one, a shipped target's."""
    if torch.cuda.is_available():
        return this_architecture()
    known = target in Target.names() and target != "cpu"
    return Target.load(target).architecture if known else ""
