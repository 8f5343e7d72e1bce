"""Time the arithmetic of fused operations on this machine, apart from what their tensors cost."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from precision_compiler.graph import shape_of, value_of
from precision_compiler.measure import Machine, layout_key

_FEW, _MANY = 1 << 13, 1 << 16  # elements of tensors in cache: their difference has no overhead

_Operation = tuple[Callable[..., Any], tuple[Any, ...]]
"""What is called, and its arguments, where an empty tensor stands for a row of elements."""


def arithmetic_seconds(nodes: Sequence[fx.Node], machine: Machine) -> float:
    """Seconds of pointwise operations and reductions on tensors in cache.

    Every operation is timed for two sizes; what an element takes beyond the cheapest operation
    that reads as many operands, which reading and writing would take anyway, is its arithmetic.

    Args:
        nodes: the operations; one that several kernels compute stands there several times.
        machine: the CPU at hand, which keeps the times.
    """
    rows = _Rows()
    moving = [(target, (torch.empty(0),) * count) for count, target in _MOVING.items()]
    own = {node: _operation(node) for node in nodes}
    cases = {
        f"{_key(*operation)} x {size}": partial(rows.call, operation, size)
        for operation in (*moving, *own.values())
        for size in (_FEW, _MANY)
    }
    seconds = machine.seconds(cases)

    def per_element(operation: _Operation) -> float:
        key = _key(*operation)
        return (seconds[f"{key} x {_MANY}"] - seconds[f"{key} x {_FEW}"]) / (_MANY - _FEW)

    least = [per_element(operation) for operation in moving]

    def beyond(node: fx.Node) -> float:
        operands = sum(bool(shape_of(source)) for source in node.all_input_nodes)
        return max(0.0, per_element(own[node]) - least[min(max(operands, 1), len(least)) - 1])

    return sum(beyond(node) * _elements(node) for node in nodes)


def _elements(node: fx.Node) -> int:
    """Elements that an operation works through: of its result, or of what it reduces."""
    return max([prod(shape_of(node)), *(prod(shape_of(s)) for s in node.all_input_nodes)])


def _operation(node: fx.Node) -> _Operation:
    """What a node computes, with an empty tensor for every one that is no single number."""
    if torch.Tag.reduction in getattr(node.target, "tags", ()):
        return torch.sum, (torch.empty(0),)

    def kind(argument: fx.Node) -> Any:
        value = value_of(argument)
        if value is None:
            return argument.meta["val"]
        return torch.ones(() if value.dim() == 0 else 0, dtype=value.dtype)

    assert callable(node.target)
    kwargs = fx.node.map_arg(node.kwargs, kind)
    return partial(node.target, **kwargs), fx.node.map_arg(node.args, kind)


def _key(target: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Text that identifies an operation in cache."""
    leaves = pytree.tree_leaves(arguments)
    return f"{getattr(target, 'func', target)} {layout_key(leaves)} in cache"


class _Rows:
    """Tensors of ones, shared by all operations so that they stay in the caches."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, int], torch.Tensor] = {}

    def call(self, operation: _Operation, size: int) -> Any:
        """Run an operation on so many elements."""
        target, arguments = operation
        return target(*pytree.tree_map(lambda argument: self._filled(argument, size), arguments))

    def _filled(self, argument: Any, size: int) -> Any:
        if not isinstance(argument, torch.Tensor) or argument.numel():
            return argument
        key = argument.dtype, size
        if key not in self._made:
            self._made[key] = torch.ones(size, dtype=argument.dtype)
        return self._made[key]


_MOVING: dict[int, Callable[..., Any]] = {1: torch.neg, 2: torch.add, 3: torch.addcmul}
"""By number of operands: operations that take no longer than reading and writing."""
