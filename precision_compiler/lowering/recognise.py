"""Recognise what a few operations compute by running them: normalisations and activations.

Spellings differ from model to model; what they compute does not. A tensor's making is cut out of
the graph where it depends on one or two tensors of its own shape and on vectors, run on random
numbers, and compared with the formulas that kernels have.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from torch import fx

from precision_compiler.graph import contraction_rule, is_cast, is_movement, shape_of

MOST_OPERATIONS = 24
"""Longest making that is looked through; a LayerNorm has about 9 operations."""
_ROWS = 3  # a sample of so many rows
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Norm:
    """A normalisation of rows.

    Attributes:
        x: what is normalised.
        weight: what is multiplied with afterwards.
        bias: what is added then, if anything.
        eps: added to the variance.
        centred: LayerNorm if True, RMSNorm if False.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    eps: float
    centred: bool


@dataclass(frozen=True)
class Activation:
    """GELU of ``x``, or with ``up``, ``silu(x) * up``."""

    x: fx.Node
    up: fx.Node | None


@dataclass(frozen=True)
class _Cut:
    """A making: the operations in order, and what they read from outside."""

    operations: tuple[fx.Node, ...]
    tensors: tuple[fx.Node, ...]
    vectors: tuple[fx.Node, ...]

    def run(self, given: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
        """The result for values of tensors and vectors."""
        values: dict[fx.Node, Any] = dict(given)
        for node in self.operations:
            args = fx.node.map_arg(node.args, values.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
        result: torch.Tensor = values[self.operations[-1]]
        return result


def recognise(made: fx.Node) -> Norm | Activation | None:
    """What a float32 tensor is computed as, if it is one of the forms above."""
    for cut in _cuts(made):
        found = _as_norm(cut) if cut.vectors else _as_activation(cut)
        if found is not None:
            return found
    return None


def _cuts(made: fx.Node) -> Iterator[_Cut]:
    """Makings of a tensor from at most two tensors of its shape, the shortest first.

    The operations nearest to the result are inside; every step takes the latest of the tensors
    outside into it, so that each of its readers is inside already. What cannot be inside stays.
    """
    inside, outside = [made], set(made.all_input_nodes)
    while outside and len(inside) < MOST_OPERATIONS:
        vectors = tuple(sorted(node for node in outside if len(shape_of(node)) == 1))
        tensors = tuple(sorted(node for node in outside if node not in vectors))
        if 1 <= len(tensors) <= 2 and all(shape_of(node) == shape_of(made) for node in tensors):
            yield _Cut(tuple(reversed(inside)), tensors, vectors)
        latest = max(filter(_can_be_inside, tensors), default=None)
        if latest is None:
            return
        outside.remove(latest)
        inside.append(latest)
        outside |= set(latest.all_input_nodes)


def _can_be_inside(node: fx.Node) -> bool:
    """Whether an operation computes rows from rows, whatever their number, on any device."""
    return (
        node.op == "call_function"
        and bool(node.all_input_nodes)
        and contraction_rule(node) is None
        and not is_cast(node)
        and not is_movement(node)
    )


def _as_norm(cut: _Cut) -> Norm | None:
    if len(cut.tensors) != 1 or len(cut.vectors) > 2:
        return None
    (x,) = cut.tensors
    width = shape_of(x)[-1]
    values = {node: _random((width,), seed) for seed, node in enumerate(cut.vectors, start=1)}
    numbers = sorted({one for node in cut.operations for one in node.args if type(one) is float})
    for weight, *rest in permutations(cut.vectors):
        bias = rest[0] if rest else None
        for eps in numbers:
            for centred in (True, False):
                given = values[weight], None if bias is None else values[bias], eps, centred
                if all(_agrees(cut, values, x, size, given) for size in (1.0, eps**0.5)):
                    return Norm(x, weight, bias, eps, centred)
    return None


def _agrees(
    cut: _Cut, values: Mapping[fx.Node, torch.Tensor], x: fx.Node, size: float, given: Any
) -> bool:
    weight, bias, eps, centred = given
    sample = _random(_sample_shape(x), 0) * size + size
    off = sample - sample.mean(-1, keepdim=True) if centred else sample
    wanted = off * torch.rsqrt(off.square().mean(-1, keepdim=True) + eps) * weight
    wanted = wanted if bias is None else wanted + bias
    return _equal(cut.run({**values, x: sample}), wanted)


def _as_activation(cut: _Cut) -> Activation | None:
    values = {node: 3 * _random(_sample_shape(node), i) for i, node in enumerate(cut.tensors)}
    found = cut.run(values)
    if len(cut.tensors) == 1:
        (x,) = cut.tensors
        return Activation(x, None) if _equal(found, _gelu(values[x])) else None
    for gate, up in permutations(cut.tensors):
        if _equal(found, torch.nn.functional.silu(values[gate]) * values[up]):
            return Activation(gate, up)
    return None


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x)


def _sample_shape(node: fx.Node) -> tuple[int, ...]:
    shape = shape_of(node)
    return (*[1] * (len(shape) - 2), _ROWS, shape[-1])


def _random(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _equal(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    return bool((found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max())
