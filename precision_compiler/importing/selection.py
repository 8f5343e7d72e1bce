"""ONNX operators that select elements or put some in the place of others."""

from typing import Any

import torch

from precision_compiler.importing.operator import Operator, Table, axes_of, require


def _slice(
    x: torch.Tensor, starts: list[int], ends: list[int], axes: Any = None, steps: Any = None
) -> torch.Tensor:
    where = axes_of(axes, x.dim()) if axes is not None else list(range(len(starts)))
    paces = steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, where, paces, strict=True):
        size = x.shape[axis]
        first, last, pace = slice(start, end, step).indices(size)
        if pace < 0:
            x = torch.flip(x, [axis])
            first, last, pace = size - 1 - first, size - 1 - last, -pace
        x = x[(*[slice(None)] * axis, slice(first, max(first, last), pace))]
    return x


def _gather(x: torch.Tensor, indices: Any, *, axis: int = 0) -> torch.Tensor:
    along = axis % x.dim()
    if isinstance(indices, int):
        return torch.select(x, along, indices)
    return x[(*[slice(None)] * along, indices)]


def _positive(indices: torch.Tensor, size: int) -> torch.Tensor:
    return torch.where(indices < 0, indices + size, indices)


def _gather_elements(x: torch.Tensor, indices: torch.Tensor, *, axis: int = 0) -> torch.Tensor:
    return torch.gather(x, axis, _positive(indices, x.shape[axis]))


def _gather_nd(x: torch.Tensor, indices: torch.Tensor, *, batch_dims: int = 0) -> torch.Tensor:
    batch = [
        torch.arange(size).reshape(-1, *[1] * (indices.dim() - 2 - axis))
        for axis, size in enumerate(x.shape[:batch_dims])
    ]
    return x[(*batch, *indices.unbind(-1))]


def _scatter_nd(
    x: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, *, reduction: str = "none"
) -> torch.Tensor:
    require(reduction in ("none", "add"), f"reduction {reduction} is not supported")
    return torch.index_put(x, indices.unbind(-1), updates, accumulate=reduction == "add")


def _scatter_elements(
    x: torch.Tensor,
    indices: torch.Tensor,
    updates: torch.Tensor,
    *,
    axis: int = 0,
    reduction: str = "none",
) -> torch.Tensor:
    require(reduction in ("none", "add"), f"reduction {reduction} is not supported")
    scatter = torch.scatter_add if reduction == "add" else torch.scatter
    return scatter(x, axis, _positive(indices, x.shape[axis]), updates)


def _one_hot(
    indices: torch.Tensor, depth: Any, values: torch.Tensor, *, axis: int = -1
) -> torch.Tensor:
    count = int(depth if isinstance(depth, int | float) else depth[0])
    hot = _positive(indices, count).unsqueeze(axis) == torch.arange(count).reshape(
        [-1 if place == axis % (indices.dim() + 1) else 1 for place in range(indices.dim() + 1)]
    )
    return torch.where(hot, values[1], values[0])


def _triangle(x: torch.Tensor, k: Any = 0, *, upper: int = 1) -> torch.Tensor:
    diagonal = k if isinstance(k, int) else k[0]
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def _non_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x).T.contiguous()


SELECTION: Table = {
    "Slice": Operator(_slice, static=(1, 2, 3, 4)),
    "Gather": Operator(_gather, numbers=(1,)),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "ScatterND": Operator(_scatter_nd),
    "ScatterElements": Operator(_scatter_elements),
    "OneHot": Operator(_one_hot, static=(1,)),
    "Trilu": Operator(_triangle, static=(1,)),
    "NonZero": Operator(_non_zero),
}
"""How each is computed."""
