"""ONNX operators that make, move, select or join elements."""

from typing import Any

import torch

from precision_compiler.importing.operator import Operator, Table, axes_of, require


def _constant(**attributes: Any) -> torch.Tensor:
    ((name, value),) = attributes.items()
    kinds = {"value_float": torch.float32, "value_floats": torch.float32,
             "value_int": torch.int64, "value_ints": torch.int64}  # fmt: skip
    require(name == "value" or name in kinds, f"a constant of kind {name} is not supported")
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=kinds[name])


def _constant_of_shape(shape: list[int], *, value: torch.Tensor | None = None) -> torch.Tensor:
    fill = torch.zeros(1) if value is None else value
    return fill.reshape(()).expand(shape).clone()


def _shape(x: torch.Tensor, *, start: int = 0, end: int | None = None) -> torch.Tensor:
    return torch.tensor(list(x.shape)[start:end], dtype=torch.int64)


def _size(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


def _range(start: torch.Tensor, limit: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _reshape(x: torch.Tensor, shape: list[int], *, allowzero: int = 0) -> torch.Tensor:
    if not allowzero:
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return torch.reshape(x, shape)


def _flatten(x: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    rows = 1
    for size in x.shape[: axis % (x.dim() + 1) if axis < 0 else axis]:
        rows *= size
    return torch.reshape(x, (rows, -1))


def _transpose(x: torch.Tensor, *, perm: list[int] | None = None) -> torch.Tensor:
    return torch.permute(x, list(perm or reversed(range(x.dim()))))


def _squeeze(x: torch.Tensor, axes: Any = None) -> torch.Tensor:
    return torch.squeeze(x) if axes is None else torch.squeeze(x, tuple(axes_of(axes, x.dim())))


def _unsqueeze(x: torch.Tensor, axes: Any) -> torch.Tensor:
    for axis in sorted(axes_of(axes, x.dim() + len(axes))):
        x = torch.unsqueeze(x, axis)
    return x


def _expand(x: torch.Tensor, shape: list[int]) -> torch.Tensor:
    wanted = [1] * (x.dim() - len(shape)) + list(shape)
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    return x.expand([b if a == 1 else a for a, b in zip(own, wanted, strict=True)])


def _slice(
    x: torch.Tensor, starts: list[int], ends: list[int], axes: Any = None, steps: Any = None
) -> torch.Tensor:
    where = axes_of(axes, x.dim()) if axes is not None else list(range(len(starts)))
    paces = steps or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, where, paces, strict=True):
        size = x.shape[axis]
        if step < 0:
            kept = list(range(size))[slice(start, None if end < -size else end, step)]
            x = torch.index_select(x, axis, torch.tensor(kept, dtype=torch.int64))
        else:
            first, last, _ = slice(start, end, step).indices(size)
            x = x[(*[slice(None)] * axis, slice(first, max(first, last), step))]
    return x


def _split(
    x: torch.Tensor, split: Any = None, *, axis: int = 0, num_outputs: int | None = None
) -> tuple[torch.Tensor, ...]:
    if split is None:
        require(num_outputs is not None, "its number of outputs is not known")
        split = -(-x.shape[axis] // (num_outputs or 1))
    return torch.split(x, split, axis)


def _concat(*values: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cat(values, axis)


def _tile(x: torch.Tensor, repeats: list[int]) -> torch.Tensor:
    return x.repeat(repeats)


def _pad(
    x: torch.Tensor, pads: list[int], value: Any = None, axes: Any = None, *, mode: str = "constant"
) -> torch.Tensor:
    where = axes_of(axes, x.dim())
    before = dict(zip(where, pads[: len(where)], strict=True))
    after = dict(zip(where, pads[len(where) :], strict=True))
    widths = [
        w for axis in reversed(range(x.dim())) for w in (before.get(axis, 0), after.get(axis, 0))
    ]
    if mode == "constant":
        return torch.nn.functional.pad(x, widths, value=value or 0)
    modes = {"reflect": "reflect", "edge": "replicate"}
    require(mode in modes, f"padding mode {mode} is not supported")
    while len(widths) > 2 and not any(widths[-2:]):
        widths = widths[:-2]
    return torch.nn.functional.pad(x, widths, mode=modes[mode])


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


def _eye_like(x: torch.Tensor, *, dtype: int | None = None, k: int = 0) -> torch.Tensor:
    require(dtype is None and k == 0, "only the main diagonal in the input's type is supported")
    return torch.eye(*x.shape, dtype=x.dtype)


def _depth_to_space(x: torch.Tensor, *, blocksize: int, mode: str = "DCR") -> torch.Tensor:
    batch, channels, height, width = x.shape
    size, rest = blocksize, channels // blocksize**2
    if mode == "CRD":
        x = x.reshape(batch, rest, size, size, height, width).permute(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(batch, size, size, rest, height, width).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(batch, rest, height * size, width * size)


SHAPES: Table = {
    "Constant": Operator(_constant),
    "ConstantOfShape": Operator(_constant_of_shape, static=(0,)),
    "Shape": Operator(_shape, of_shape=True),
    "Size": Operator(_size, of_shape=True),
    "EyeLike": Operator(_eye_like, of_shape=True),
    "Range": Operator(_range),
    "Reshape": Operator(_reshape, static=(1,)),
    "Flatten": Operator(_flatten),
    "Transpose": Operator(_transpose),
    "Squeeze": Operator(_squeeze, static=(1,)),
    "Unsqueeze": Operator(_unsqueeze, static=(1,)),
    "Expand": Operator(_expand, static=(1,)),
    "Slice": Operator(_slice, static=(1, 2, 3, 4)),
    "Split": Operator(_split, static=(1,)),
    "Concat": Operator(_concat),
    "Tile": Operator(_tile, static=(1,)),
    "Pad": Operator(_pad, static=(1, 2, 3)),
    "Gather": Operator(_gather, numbers=(1,)),
    "GatherElements": Operator(_gather_elements),
    "GatherND": Operator(_gather_nd),
    "ScatterND": Operator(_scatter_nd),
    "ScatterElements": Operator(_scatter_elements),
    "OneHot": Operator(_one_hot, static=(1,)),
    "Trilu": Operator(_triangle, static=(1,)),
    "NonZero": Operator(_non_zero),
    "DepthToSpace": Operator(_depth_to_space),
}
"""How each is computed."""
