"""ONNX operators that reduce or normalise along axes."""

from collections.abc import Callable
from typing import Any

import torch

from precision_compiler.importing.operator import Operator, Table, axes_of, require

Reduce = Callable[[torch.Tensor, list[int], bool], torch.Tensor]


def _reduction(reduce: Reduce) -> Operator:
    def run(
        x: torch.Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> torch.Tensor:
        if not axes and noop_with_empty_axes:
            return x
        return reduce(x, axes_of(axes, x.dim()), bool(keepdims))

    return Operator(run, static=(1,))


def _product(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


_REDUCTIONS: dict[str, Reduce] = {
    "ReduceSum": lambda x, axes, keep: torch.sum(x, axes, keepdim=keep, dtype=x.dtype),
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceL1": lambda x, axes, keep: torch.sum(torch.abs(x), axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.sqrt(torch.sum(x * x, axes, keepdim=keep)),
    "ReduceSumSquare": lambda x, axes, keep: torch.sum(x * x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: torch.log(torch.sum(x, axes, keepdim=keep)),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
}


def _best(choose: Callable[..., torch.Tensor]) -> Operator:
    def run(
        x: torch.Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0
    ) -> torch.Tensor:
        require(not select_last_index, "select_last_index=1 is not supported")
        return choose(x, axis, keepdim=bool(keepdims))

    return Operator(run)


def _top_k(
    x: torch.Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    count = k if isinstance(k, int) else k[0]
    values, indices = torch.topk(x, count, axis, bool(largest), bool(sorted))
    return values, indices


def _softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.softmax(x, axis)


def _log_softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, axis)


def _layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    shape = x.shape[axis:]
    if weight.shape == shape and (bias is None or bias.shape == shape):
        return torch.nn.functional.layer_norm(x, shape, weight, bias, epsilon)
    found = torch.nn.functional.layer_norm(x, shape, eps=epsilon) * weight
    return found if bias is None else found + bias


def _rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    axes = list(range(axis % x.dim(), x.dim()))
    return x * torch.rsqrt(torch.mean(x * x, axes, keepdim=True) + epsilon) * weight


def _per_channel(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return weight.reshape(-1, *[1] * (x.dim() - 2))


def _instance_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, epsilon: float = 1e-5
) -> torch.Tensor:
    found = torch.nn.functional.layer_norm(x, x.shape[2:], eps=epsilon)
    return found * _per_channel(weight, x) + _per_channel(bias, x)


def _group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,
) -> torch.Tensor:
    require(weight.shape[0] == x.shape[1], "its scale must have one number per channel")
    return torch.nn.functional.group_norm(x, num_groups, weight, bias, epsilon)


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> torch.Tensor:
    require(not training_mode, "it is in training mode: export for inference")
    factor = weight * torch.rsqrt(variance + epsilon)
    return (x - _per_channel(mean, x)) * _per_channel(factor, x) + _per_channel(bias, x)


def _lp_norm(x: torch.Tensor, *, axis: int = -1, p: int = 2) -> torch.Tensor:
    return torch.div(x, torch.linalg.vector_norm(x, p, axis, keepdim=True))


def _cumulative_sum(
    x: torch.Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0
) -> torch.Tensor:
    (along,) = axes_of(axis, x.dim())
    if reverse:
        x = torch.flip(x, [along])
    found = torch.cumsum(x, along, dtype=x.dtype)
    if exclusive:
        found = found - x
    return torch.flip(found, [along]) if reverse else found


REDUCTIONS: Table = {
    **{name: _reduction(reduce) for name, reduce in _REDUCTIONS.items()},
    "ArgMax": _best(torch.argmax),
    "ArgMin": _best(torch.argmin),
    "TopK": Operator(_top_k, static=(1,)),
    "Softmax": Operator(_softmax),
    "LogSoftmax": Operator(_log_softmax),
    "LayerNormalization": Operator(_layer_norm),
    "RMSNormalization": Operator(_rms_norm),
    "InstanceNormalization": Operator(_instance_norm),
    "GroupNormalization": Operator(_group_norm),
    "BatchNormalization": Operator(_batch_norm),
    "LpNormalization": Operator(_lp_norm),
    "CumSum": Operator(_cumulative_sum, static=(1,)),
}
"""How each is computed."""
