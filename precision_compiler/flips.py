"""Choices that errors flip: there a derivative says nothing of what an error does.

The derivative of ReLU is 1 or 0 by the sign of its input. In the backward pass that is a choice
between the arriving gradient and 0, made by a comparison. To first order an error of the compared
number changes nothing. In truth it flips choices whose numbers are closer to the boundary than the
error is, and each of them changes the result by all that lies between the two values: ``a - b``.
With ``h`` the derivative of the objective by the choice's result and ``y`` the distance from the
boundary, its squared error is ``sum h^2 (a - b)^2 P(flip)``. Errors of standard deviation ``sigma``
flip a share of ``sigma / sqrt(2 pi)`` of what there is per unit of ``y`` around the boundary. So
this square grows with ``sigma``, those of other errors with ``sigma^2``: the smaller errors are,
the more of them are flips.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import pi
from typing import Any

import torch
from torch import fx

from precision_compiler.graph import is_float32, is_view, reached_from, shape_of, value_of
from precision_compiler.sampling import sampled
from precision_compiler.signs import Signs

_CHOOSE = torch.ops.aten.where.self
_NEAR = 0.5  # of the root mean square: closer to the boundary, numbers lie about evenly


@dataclass(frozen=True, eq=False)
class Choice:
    """The choices of one node by one comparison, while derivatives are awaited.

    Attributes:
        jump: sampled differences of the two values.
        weight: what the square of each counts in what there is at the boundary.
        near: the compared numbers that are close to the boundary.
        size: root mean square of the compared numbers.
    """

    jump: torch.Tensor
    weight: torch.Tensor
    near: torch.Tensor
    size: float

    def effects(self, adjoint: torch.Tensor) -> torch.Tensor:
        """``h (a - b)`` of the sampled choices, by derivatives of the results of all of them."""
        return sampled(adjoint).double() * self.jump

    def density(self, effects: torch.Tensor) -> float:
        """``sum (h (a - b))^2`` per relative distance from the boundary.

        Args:
            effects: of sampled choices, summed over all nodes that the same comparison decides:
                they flip together.
        """
        known = float(effects.square() @ self.weight) * self.near.numel() / len(effects)
        return max(0.0, known)


def deciding(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node that chooses, the comparisons of computed numbers that decide."""
    inputs = graph.find_nodes(op="placeholder")
    computed = reached_from([node for node in inputs if is_float32(node)])
    nodes = graph.find_nodes(op="call_function", target=_CHOOSE)
    found = {node: _comparisons(node, computed) for node in nodes if is_float32(node)}
    return {node: compared for node, compared in found.items() if compared}


def _comparisons(node: fx.Node, computed: set[fx.Node]) -> list[fx.Node]:
    """Those that a condition is combined of."""
    found, condition = list[fx.Node](), node.args[0]
    pending = {condition} if isinstance(condition, fx.Node) else set()
    seen = set(pending)
    while pending:
        one = pending.pop()
        if any(is_float32(source) for source in one.all_input_nodes):
            moved = not computed.isdisjoint(one.all_input_nodes)
            if moved and _has_boundary(one.target) and shape_of(one) == shape_of(node):
                found.append(one)
            continue
        pending |= set(one.all_input_nodes) - seen
        seen |= pending
    return found


@cache
def _has_boundary(comparison: Any) -> bool:
    """Whether it tells smaller from larger numbers; one that looks for equals does not."""
    if torch.Tag.pointwise not in getattr(comparison, "tags", ()):
        return False
    if len(comparison._schema.arguments) != 2:
        return False
    right: Any = torch.zeros(2) if "Tensor" in comparison._overloadname else 0.0
    smaller, larger = comparison(torch.tensor([-1.0, 1.0]), right).tolist()
    return isinstance(smaller, bool) and smaller != larger


def compared(comparison: fx.Node) -> list[fx.Node]:
    """The float32 tensors that a comparison is about, before they are viewed as they are.

    Those that are repeated for it, such as thresholds of whole rows, are left out.
    """
    found = []
    for node in comparison.all_input_nodes:
        while is_view(node) and _layout(node) == _layout(node.args[0]):
            assert isinstance(node.args[0], fx.Node)
            node = node.args[0]
        if is_float32(node) and shape_of(node) == shape_of(comparison):
            found.append(node)
    return found


def _layout(node: Any) -> tuple[Any, ...]:
    value = value_of(node)
    return () if value is None else (value.shape, value.stride())


def choice(values: Sequence[torch.Tensor], sides: tuple[Any, Any]) -> Choice | None:
    """What is chosen by one comparison; None if all compared numbers are alike.

    Of numbers on one side of the boundary, such as the results of ReLU, those on the other side
    cannot be told apart: they are taken to be as close to it. Infinite values, which mask, count
    nothing.

    Args:
        values: the condition and the two values to choose from.
        sides: of the comparison: tensors or numbers.
    """
    shape = values[0].shape
    first, second = (sampled(value.expand(shape)) for value in values[1:])
    distance = torch.as_tensor(sides[0] - sides[1]).expand(shape)
    apart = sampled(distance)
    apart = apart[apart.isfinite() & (apart != 0)]
    if not apart.numel():
        return None
    sides_seen = 1 if bool((apart > 0).all() or (apart < 0).all()) else 2
    size = float(apart.square().mean().sqrt())
    near, nearer = ((distance != 0) & (distance.abs() < _NEAR * size / k) for k in (1, 2))
    # Of values that meet at the boundary, squares of differences grow with that of the distance.
    # Four times what the nearer half has per unit, less what all have, is three times the rest.
    weight = (8 * sampled(nearer).double() - sampled(near).double()) / 3
    jump = (first - second).double().nan_to_num(0.0, 0.0, 0.0)
    return Choice(jump, weight * 2 / sides_seen / _NEAR, near, size)


class NearBoundaries(Sequence[torch.Tensor]):
    """What compared numbers are multiplied with, so that their errors show in one objective.

    Its square is the mean square error of the numbers near boundaries, relative to the root mean
    square of what they are compared among, weighted by how much depends on their choices. It is
    asked for after the derivatives that say so have arrived.
    """

    def __init__(
        self,
        choices: Sequence[tuple[fx.Node, Choice]],
        density: Callable[[], Mapping[fx.Node, float]],
        seed: int,
    ) -> None:
        """Draw.

        Args:
            choices: for every tensor of compared numbers, the comparison and what it chooses.
            density: of the choices, by comparison.
            seed: of the signs.
        """
        self._choices, self._density = choices, density
        likes = [
            one.jump.new_empty((), dtype=torch.float32).expand_as(one.near) for _, one in choices
        ]
        self._signs = Signs(likes, [1.0] * len(choices), seed)

    def __len__(self) -> int:
        return len(self._choices)

    def __getitem__(self, index: Any) -> Any:
        (comparison, one), density = self._choices[index], self._density()
        share = density.get(comparison, 0.0) / (sum(density.values()) or 1.0)
        weight = (share / max(1, int(one.near.sum()))) ** 0.5 / one.size
        signs: torch.Tensor = self._signs[index]
        return signs * one.near * weight


def flip_variance(density: float, variance: float) -> float:
    """The squared relative gradient error that flips alone cause.

    Args:
        density: of all choices.
        variance: of the compared numbers' errors, relative to their mean square.
    """
    return float(density * (variance / (2 * pi)) ** 0.5)


def steepest(density: float, error: float) -> float:
    """Squared error by variance of compared numbers, where flips alone cause an error."""
    return (density / error) ** 2 / (2 * pi)
