"""Which products in which formats some kernel runs, and on which GPU."""

import torch
from torch import fx

from precision_compiler.formats import CHOICES
from precision_compiler.gpu import this_architecture
from precision_compiler.graph import has_open_sizes, is_matrix_product, shape_of
from precision_compiler.kernels.targets import (
    ARCHITECTURES,
    known_architecture,
    reason_against,
)
from precision_compiler.scaling import hardware_format
from precision_compiler.sites import operand_nodes
from precision_compiler.target import Target


def reason_against_product(node: fx.Node, fmt: str, architecture: str) -> str:
    """Why no kernel runs a contraction in a format; empty if one does, or it is not known.

    Args:
        node: the contraction.
        fmt: of its operands.
        architecture: such as "sm_90"; one that is not in the kernels' table is taken at its word.
    """
    if fmt != "tf32" and not CHOICES[fmt].scaled:
        return ""
    if fmt == "tf32" and not is_matrix_product(node):
        return "tf32 can be asked for of products of matrices alone"
    if any(factor != 1 for factor in node.kwargs.values()):
        return "it multiplies its sum or its addend by a number of its own"
    if fmt == "tf32":
        return ""
    operands = operand_nodes(node)
    if not is_matrix_product(node) or any(len(shape_of(one)) != 2 for one in operands):
        return "scales are for products of two matrices, not attention, batches or convolutions"
    base = hardware_format(fmt)
    if not any(base in machine.matrix for machine in ARCHITECTURES):
        return f"no kernel multiplies {fmt}: neither torch nor Triton has its products"
    if any(map(has_open_sizes, operands)):
        return "its sizes are open, and operands are laid out for one size"
    machine = known_architecture(architecture)
    return "" if machine is None else reason_against(machine, base, matrix=True)


def architecture_for(target: str) -> str:
    """What graphs are lowered for: the GPU at hand, or without one, a shipped target's."""
    if torch.cuda.is_available():
        return this_architecture()
    known = shipped(target)
    return "" if known is None else known.architecture


def shipped(target: str) -> Target | None:
    """A plan's target if its speed is in a file of ours; None for this machine and a user's."""
    return Target.load(target) if target in Target.names() and target != "cpu" else None
