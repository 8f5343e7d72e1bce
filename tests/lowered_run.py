"""Runs a graph that is lowered for a GPU on the CPU, scaled products by their definition.

The definition is written anew here, from the operations' documentation: scales are put back into
rows, codes are decoded by table, and the product is a float32 one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from precision_compiler import attention
from precision_compiler.lowering.products import SCALED_MM
from precision_compiler.replay import execute

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one node; ``Replay`` takes it."""
    args = torch.utils._pytree.tree_map(_on_cpu, args)
    kwargs = torch.utils._pytree.tree_map(_on_cpu, kwargs)
    if node.target is SCALED_MM:
        return scaled_mm(*args)
    formula = attention.substitutes().get(node.target)
    if formula is not None:
        return formula(lambda x: x, *args, **kwargs)
    return execute(node, args, kwargs)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def scaled_mm(
    left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor,
    bias: None, result_scale: None, dtype: torch.dtype, fast: bool,
) -> Tensor:  # fmt: skip
    """``aten._scaled_mm``: the operands' numbers times their scales, summed in float32."""
    assert (bias, result_scale, fast) == (None, None, False)
    assert left.is_contiguous()
    assert right.t().is_contiguous()
    assert [left.shape[1] % 16, right.shape[0] % 16, right.shape[1] % 16] == [0, 0, 0]
    rows = numbers(left, left_scale), numbers(right.t(), _turned(right_scale))
    return (rows[0] @ rows[1].t()).to(dtype)


def _turned(scale: Tensor) -> Tensor:
    return scale.t() if scale.dim() == 2 else scale


def numbers(elements: Tensor, scales: Tensor) -> Tensor:
    """What the elements of an operand with its summed axis last stand for, float32."""
    if scales.dtype == torch.float32:
        return elements.float() * spread(scales, elements.shape)
    size = 16 if scales.dtype == torch.float8_e4m3fn else 32
    if elements.dtype == torch.float4_e2m1fn_x2:
        codes = elements.view(torch.uint8)
        pairs = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()
        wide = E2M1[pairs & 7] * torch.where(pairs >= 8, -1.0, 1.0)
    else:
        wide = elements.float()
    rows, blocks = wide.shape[0], wide.shape[1] // size
    return wide * in_rows(scales, rows, blocks).float().repeat_interleave(size, 1)


def spread(scales: Tensor, shape: torch.Size) -> Tensor:
    """Float32 scales of a tensor, rows, or blocks of 1 x 128 or 128 x 128: one per element."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(shape)
    rows, columns = shape
    if scales.shape == (rows, 1) and scales.is_contiguous():
        return scales.expand(shape)
    blocks = -(-columns // 128)
    if scales.shape == (rows, blocks):
        assert scales.stride() == (1, rows)
        return scales.repeat_interleave(128, 1)[:, :columns]
    assert scales.shape == (-(-rows // 128), blocks)
    assert scales.stride() == (-(-blocks // 4) * 4, 1)
    return scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def in_rows(scales: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales in cuBLAS's order, one row per row of the operand again: element by element."""
    flat = scales.view(torch.uint8)
    across = -(-blocks // 4)
    r, b = torch.meshgrid(torch.arange(rows), torch.arange(blocks), indexing="ij")
    tile = (r // 128) * across + b // 4
    inside = (r % 32) * 16 + (r % 128) // 32 * 4 + b % 4
    found: Tensor = flat[tile * 512 + inside].view(scales.dtype)
    return found


def results(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Any]:
    """Results of a graph without a backward pass of its own."""
    values = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    for node in module.graph.nodes:
        if node.op == "call_function":
            args = fx.node.map_arg(node.args, values.__getitem__)
            values[node] = run(node, args, fx.node.map_arg(node.kwargs, values.__getitem__))
    wanted: Any = module.graph.output_node().args[0]
    return [values[node] for node in wanted]
