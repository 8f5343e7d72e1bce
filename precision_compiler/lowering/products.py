"""What format a product in a graph really has, read from the graph and nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import fx

from precision_compiler.facts import facts_of
from precision_compiler.formats import format_of_dtype
from precision_compiler.graph import aten, base_name, contraction_rule, shape_of, value_of
from precision_compiler.kernels import block_gemm, scaled_gemm  # noqa: F401 - registers them
from precision_compiler.scaling import SCALED_FORMATS
from precision_compiler.sites import rounded_arguments
from precision_compiler.tf32 import TF32_MATMUL

SCALED_MM = aten._scaled_mm.default
SCALED_GEMM = torch.ops.precision_compiler.scaled_gemm.default
BLOCK_GEMM = torch.ops.precision_compiler.block_gemm.default

FLASH = aten._scaled_dot_product_flash_attention.default
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_backward.default

_BLOCK_FORMATS: Mapping[tuple[torch.dtype, torch.dtype], str] = MappingProxyType(
    {
        (row.element_dtype, row.scale_dtype): row.name
        for row in SCALED_FORMATS.values()
        if row.element_dtype is not None and not row.base
    }
)
"""Block formats by the dtypes of elements and scales: those of recipes are their formats'."""
SIXTEEN_BITS = (torch.bfloat16, torch.float16)
"""What products give at once beside float32, and what FlashAttention takes."""


@dataclass(frozen=True)
class Product:
    """One product or attention of a graph.

    Attributes:
        site: the site it carries out.
        format: of its operands, as their dtypes and scales say.
        operation: base name of what computes it.
    """

    site: str
    format: str
    operation: str


@dataclass(frozen=True, eq=False)
class Lowered:
    """A training graph as a GPU would run it.

    Attributes:
        module: the graph, on GPU tensors without contents.
        products: what carries out each contraction site.
        notes: the remarks of the passes on the way, a sentence each: what runs in fewer kernels,
            what stays without a kernel for its format and why. Empty where they had none.
    """

    module: fx.GraphModule
    products: tuple[Product, ...]
    notes: tuple[str, ...]


def format_of_product(node: fx.Node) -> str | None:
    """The format that the operands of a product have; None where the node is no product.

    Operands that do not agree give the names of both, joined by "*".
    """
    if node.op != "call_function":
        return None
    if node.target is TF32_MATMUL:
        return "tf32"
    if node.target is BLOCK_GEMM:
        return str(node.args[5])
    if node.target in (SCALED_MM, SCALED_GEMM):
        left, right, *scales = (_dtype(argument) for argument in node.args[:4])
        names = [_scaled(*pair) for pair in zip((left, right), scales, strict=True)]
        names = [f"{name}{_scaling(node)}" for name in names]
    elif node.target in (FLASH, FLASH_BACKWARD):
        names = [_scaled(_dtype(argument), None) for argument in node.args[:3]]
    elif contraction_rule(node) is not None:
        names = [_scaled(_dtype(value), None) for value in rounded_arguments(node).values()]
    else:
        return None
    return "*".join(dict.fromkeys(names))


def products_of(graph: fx.Graph) -> tuple[Product, ...]:
    """Every product that carries out a site, in the graph's order."""
    found = []
    for node in graph.nodes:
        facts, fmt = facts_of(node), format_of_product(node)
        if fmt is not None and facts is not None:
            found.append(Product(facts.site or facts.name, fmt, base_name(node.target)))
    return tuple(found)


def _scaling(node: fx.Node) -> str:
    """What float32 scales of a product's rows or blocks are called; "" for a tensor's."""
    left, right = (value_of(one) for one in node.args[2:4] if isinstance(one, fx.Node))
    assert left is not None
    assert right is not None
    if left.dtype != torch.float32 or (left.numel() == 1 and right.numel() == 1):
        return ""
    columns = shape_of(node.args[1])[1]  # type: ignore[arg-type]
    is_row = left.dim() == 1 or (left.shape[1] == 1 and right.shape[1] == columns)
    return "_row" if is_row else "_1x128"


def _dtype(argument: object) -> torch.dtype:
    value = value_of(argument) if isinstance(argument, fx.Node) else None
    if value is None:
        raise TypeError(f"{argument} is no tensor of a known dtype")
    return value.dtype


def _scaled(elements: torch.dtype, scales: torch.dtype | None) -> str:
    if scales is not None and (elements, scales) in _BLOCK_FORMATS:
        return _BLOCK_FORMATS[elements, scales]
    fmt = format_of_dtype(elements)
    return str(elements) if fmt is None else fmt.name
