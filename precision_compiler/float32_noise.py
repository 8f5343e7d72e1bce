"""Which gradients float32 does not decide: zero by the structure of the model, but for rounding."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from precision_compiler.graph import contraction_rule
from precision_compiler.replay import draws, execute
from precision_compiler.statistics import TensorGradient
from precision_compiler.tape import Tape

_SUSPICIOUS = 1e-3  # of the root mean square gradient: below it, a gradient may be noise alone
_DEPTH = 2  # products that a doubtful gradient is computed through again


def with_float32_noise(
    tape: Tape, tensors: Sequence[TensorGradient], gradients: Sequence[torch.Tensor]
) -> tuple[TensorGradient, ...]:
    """How far float32 decides the gradients that are small.

    They are computed again through the last products, from values that are each moved by one unit
    in the last place: a gradient that is nothing but rounding noise moves about as far as it is
    long. (One product alone can be too few: what cancels may do so in the operands already.)

    Args:
        tape: after ``record``, while it still has its values.
        tensors: one for each gradient.
        gradients: what it recorded.

    Returns:
        The tensors, ``noise`` filled in where the gradient is small.
    """
    squares = sum(tensor.norm**2 for tensor in tensors)
    typical = (squares / sum(tensor.elements for tensor in tensors)) ** 0.5
    found = list(tensors)
    small = [
        index
        for index, tensor in enumerate(tensors)
        if tensor.norm <= _SUSPICIOUS * typical * tensor.elements**0.5
    ]
    for index in small:
        change = _moved(tape, tape.gradients[index]) - gradients[index]
        found[index] = replace(tensors[index], noise=euclidean_norm(change))
    return tuple(found)


def euclidean_norm(gradient: torch.Tensor) -> float:
    """Euclidean norm, added up in float64."""
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


@torch.no_grad()
def _moved(tape: Tape, goal: fx.Node) -> Any:
    """A gradient, from neighbours of values that the tape has."""
    again = _to_run_again(tape, goal)
    found: dict[fx.Node, Any] = {}

    def read(node: fx.Node) -> Any:
        if node not in found:
            found[node] = _next_larger(tape.values[node])
        return found[node]

    with torch.random.fork_rng():
        for chunk in tape.chunks:
            steps = [node for node in chunk.nodes if node in again]
            if any(map(draws, steps)):
                tape.seed_numbers(chunk)
            for node in steps:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), read)
                found[node] = execute(node, args, kwargs)
    return read(goal)


def _to_run_again(tape: Tape, goal: fx.Node) -> set[fx.Node]:
    """What a gradient is computed by, back to values at hand that lie behind enough products."""
    depth = {goal: 0}  # products between a node and the gradient, at the least
    again = set()
    for chunk in reversed(tape.chunks):
        drawn = [node for node in chunk.nodes if draws(node)]
        for node in reversed(chunk.nodes):
            if node not in depth or _is_at_hand(tape, node, depth[node]):
                continue
            again.add(node)
            if draws(node):  # after the same numbers as before
                depth |= dict.fromkeys(drawn, 0)
            further = depth[node] + (contraction_rule(node) is not None)
            for source in node.all_input_nodes:
                depth[source] = min(depth.get(source, further), further)
    return again


def _is_at_hand(tape: Tape, node: fx.Node, depth: int) -> bool:
    """Whether to start from a node's value; those that cannot move are taken where they are."""
    value = tape.values.get(node)
    moves = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value is not None and (depth >= _DEPTH or not moves)


def _next_larger(value: Any) -> Any:
    """The next larger float32 numbers; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
        return value
    return value.detach().nextafter(torch.tensor(torch.inf, device=value.device))
