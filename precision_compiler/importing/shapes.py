"""ONNX operators that make, move or join elements."""

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


def _split(
    x: torch.Tensor,
    split: Any = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int,
) -> tuple[torch.Tensor, ...]:
    if split is None:
        size, parts = x.shape[axis], num_outputs or outputs
        each = -(-size // parts)
        split = [max(0, min(each, size - each * index)) for index in range(parts)]
    return torch.split(x, split, axis)


def _concat(*values: torch.Tensor, axis: int) -> torch.Tensor:
    return torch.cat(values, axis)


def _tile(x: torch.Tensor, repeats: list[int]) -> torch.Tensor:
    return x.repeat(repeats)


def _pad(
    x: torch.Tensor, pads: list[int], value: Any = None, axes: Any = None, *, mode: str = "constant"
) -> torch.Tensor:
    where = axes_of(axes, x.dim())
    before, after = pads[: len(where)], pads[len(where) :]
    if mode == "constant":
        widths = [0] * (2 * x.dim())
        for axis, low, high in zip(where, before, after, strict=True):
            place = 2 * (x.dim() - 1 - axis)
            widths[place], widths[place + 1] = low, high
        return torch.nn.functional.pad(x, widths, value=value or 0)
    require(mode in ("reflect", "edge"), f"padding mode {mode} is not supported")
    for axis, low, high in zip(where, before, after, strict=True):
        x = _continued(x, axis, low, high, mode)
    return x


def _continued(x: torch.Tensor, axis: int, low: int, high: int, mode: str) -> torch.Tensor:
    """A tensor with elements before and after it, mirrored or repeated from its ends."""
    size = x.shape[axis]
    if mode == "reflect":
        left = torch.flip(x.narrow(axis, 1, low), [axis])
        right = torch.flip(x.narrow(axis, size - 1 - high, high), [axis])
    else:
        left = torch.repeat_interleave(x.narrow(axis, 0, 1), low, axis)
        right = torch.repeat_interleave(x.narrow(axis, size - 1, 1), high, axis)
    return torch.cat([left, x, right], axis)


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
    "Split": Operator(_split, static=(1,), counts=True),
    "Concat": Operator(_concat),
    "Tile": Operator(_tile, static=(1,)),
    "Pad": Operator(_pad, static=(1, 2, 3)),
    "DepthToSpace": Operator(_depth_to_space),
}
"""How each is computed."""
