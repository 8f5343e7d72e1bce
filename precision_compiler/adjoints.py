"""Derivatives on their way from chunk to chunk."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import GradientEdge
from torch.utils._python_dispatch import TorchDispatchMode

from precision_compiler.errors import AnalysisError
from precision_compiler.facts import facts_of
from precision_compiler.tf32 import float32_products

_NO_DERIVATIVE = re.compile(r"(?:derivative for|backward through) '?([\w:.]+)'? (?:is|but) no")
"""What autograd says of an operator of torch, and of one that is registered with it."""


@dataclass
class Adjoints:
    """Derivatives of one objective that wait for the chunk that made their tensors.

    Attributes:
        probe: what each gradient is multiplied with.
        seeds: of gradients, their positions.
        found: what later chunks gave.
    """

    probe: Sequence[torch.Tensor]
    seeds: dict[fx.Node, list[int]] = field(default_factory=dict)
    found: dict[fx.Node, torch.Tensor] = field(default_factory=dict)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self.seeds or node in self.found

    def add(self, node: fx.Node, value: torch.Tensor) -> None:
        """One more reader's derivative."""
        self.found[node] = self.found[node] + value if node in self.found else value

    def take(self, node: fx.Node) -> torch.Tensor:
        """The sum of all that arrived at a node."""
        for index in self.seeds.pop(node, ()):
            self.add(node, self.probe[index])
        return self.found.pop(node)


class Known(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets autograd record an operation whose result is known, without running it."""

    def __init__(self, target: Any, value: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._target, self._value = target, value

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch asks for every operation, below autograd."""
        if func is self._target:
            return self._value.detach()
        return func(*args, **(kwargs or {}))


class _Gate(torch.autograd.Function):
    """Nothing, but for derivatives that do not count: autograd follows those no further."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, least: Callable[[], float]) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.least = least
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, adjoint: torch.Tensor) -> Any:
        (value,) = ctx.saved_tensors
        shown = torch.linalg.vector_norm(adjoint * value)
        return (adjoint if float(shown) > ctx.least() else None), None


def gated(value: torch.Tensor, least: Callable[[], float]) -> torch.Tensor:
    """The value; derivatives that reach it stop if they are next to nothing.

    Such are those of the maxima that softmax subtracts: they are zero but for rounding, and
    following them through a large tensor takes as long as the rest of a loss.

    Args:
        value: a tensor that requires a gradient.
        least: by how much errors of 100 % in all elements have to change the objective (root of
            the sum of squares) in order to count; asked for when the derivative arrives.
    """
    made: torch.Tensor = _Gate.apply(value, least)  # type: ignore[no-untyped-call]
    return made


def derivatives(
    outputs: Sequence[tuple[GradientEdge, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    retain: bool = True,
    roughly: bool = False,
    nodes: Iterable[fx.Node] = (),
) -> Sequence[torch.Tensor | None]:
    """Derivatives by every input; None where there is none.

    Args:
        outputs: what is differentiated, by its place in autograd's graph, so that the tensors
            themselves need not be there; and what each is multiplied with.
        inputs: by what.
        retain: whether the same outputs are differentiated again.
        roughly: whether the hardware may round operands of products where that is faster.
        nodes: what is differentiated, if it is part of the graph and not the loss.

    Raises:
        AnalysisError: an operator has no derivative.
    """
    if not outputs or not inputs:
        return [None] * len(inputs)
    edges, seeds = zip(*outputs, strict=True)
    try:
        with _fast_products() if roughly else nullcontext():
            return torch.autograd.grad(edges, inputs, seeds, retain_graph=retain, allow_unused=True)
    except RuntimeError as error:
        unknown = _NO_DERIVATIVE.search(str(error))
        if unknown is None:
            raise
        raise AnalysisError(_without_derivative(unknown[1], nodes)) from error


def _without_derivative(operator: str, nodes: Iterable[fx.Node]) -> str:
    word = operator.replace("::", ".")
    calls = [node for node in nodes if word in str(node.target)]
    known = facts_of(calls[0]) if calls else None
    return (
        f"{known.name if known else 'the loss'}: {word} has no derivative, and the analysis "
        "differentiates the backward pass, too: register one with torch.library.register_autograd, "
        "or plan the model with other operators in its place (mixtures of experts in transformers: "
        "model.set_experts_implementation('batched_mm'))"
    )


@contextmanager
def _fast_products() -> Iterator[None]:
    """Let the hardware round operands of float32 products where that makes it faster.

    To bf16 where a CPU multiplies matrices in it (oneDNN keeps float32 elsewhere), to tf32 on
    GPUs. A product is then off by a few tenths of a per cent, a sum of its results that cancel by
    a few per cent.
    """
    backends: Any = torch.backends  # which stubs know in part
    cpu, gpu = backends.mkldnn.matmul, backends.cuda.matmul
    with float32_products(cpu, "bf16"), float32_products(gpu, "tf32"):
        yield


def has_history(value: Any) -> bool:
    """Whether a value is a tensor that autograd can differentiate."""
    return is_float(value) and value.requires_grad


def is_float(value: Any) -> bool:
    """Whether a value is a tensor that can have a derivative."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()
