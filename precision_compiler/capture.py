"""A model and a batch become one joint graph with real inputs, and the way to its loss."""

import itertools
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from precision_compiler.calling import (
    Loss,
    call_model,
    clear_errors,
    left_as_it_was,
    loss_of,
    plain_operations,
    unbroken_by_logging,
)
from precision_compiler.errors import CaptureError
from precision_compiler.joint import JointGraph, trace_joint

Forward = Callable[[], Sequence[Any]]

_numbers = itertools.count()


@dataclass
class Captured:
    """A joint graph and the way from its forward results to the loss.

    Attributes:
        joint: the graph and its inputs.
        objective: takes a function that computes the forward results and returns the loss,
            connected to them by autograd.
        origin: a sentence on where the loss comes from.
    """

    joint: JointGraph
    objective: Callable[[Forward], torch.Tensor]
    origin: str


def capture(model: nn.Module, batch: Any, loss: Loss | None = None) -> Captured:
    """Capture the training graph of a model on a batch; the model is left as it was.

    Raises:
        CaptureError: the model fails on the batch, breaks into several graphs, or there is no
            scalar loss.
    """
    with left_as_it_was(model), torch.enable_grad():
        with clear_errors():
            loss_of(call_model(model, batch), batch, loss)
        recorder = _record(model, batch)
        joint = recorder.joint

        def objective(forward: Forward) -> torch.Tensor:
            with left_as_it_was(model), torch.enable_grad():
                return loss_of(recorder.run(forward), batch, loss)

    origin = "loss(output, batch)" if loss is not None else "the model's own loss"
    return Captured(joint, objective, origin)


def capture_inference(model: nn.Module, batch: Any) -> JointGraph:
    """Capture the forward graph of a model in evaluation mode; the model is left as it was.

    Raises:
        CaptureError: the model fails on the batch or breaks into several graphs.
    """
    training = [module for module in model.modules() if module.training]
    with left_as_it_was(model), torch.no_grad(), plain_operations():
        model.eval()
        try:
            with clear_errors():
                call_model(model, batch)
            return _record(model, batch).joint
        finally:
            for module in training:
                module.training = True


def captured_alone(joint: JointGraph) -> Captured:
    """A graph compiled without a known batch: its only scalar result is taken for the loss.

    Where there is none, the loss is a fixed random combination of the results, which weighs all
    of them alike.
    """

    def objective(forward: Forward) -> torch.Tensor:
        results: list[torch.Tensor] = [value for value in forward() if _differentiable(value)]
        scalars = [value for value in results if value.numel() == 1]
        if scalars:
            return scalars[0].reshape(())
        generator = torch.Generator().manual_seed(0)
        return torch.stack([_random_projection(value, generator) for value in results]).sum()

    return Captured(joint, objective, "the graph's scalar result, or a random combination")


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad


def _random_projection(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    weights = torch.randn(value.shape, generator=generator).to(value)
    return (value * weights).sum()


class _Recorder:
    """A Dynamo backend that traces the joint graph and lets others supply its results."""

    def __init__(self) -> None:
        self.joints: list[JointGraph] = []
        self.forward: Forward | None = None
        self.function: Callable[[], Any] | None = None

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.joints.append(trace_joint(module, inputs))

        def run(*values: Any) -> Sequence[Any]:
            return self.forward() if self.forward is not None else module(*values)

        return run

    @property
    def joint(self) -> JointGraph:
        return self.joints[0]

    def run(self, forward: Forward | None) -> Any:
        """Call the model with the graph's results computed by ``forward``."""
        assert self.function is not None
        self.forward = forward
        try:
            return self.function()
        finally:
            self.forward = None


def _record(model: nn.Module, batch: Any) -> _Recorder:
    recorder = _Recorder()

    def call() -> Any:
        return call_model(model, batch)

    # Dynamo keeps its caches with the code object: a new one, so that nothing of this capture
    # stays behind in the user's functions.
    code = call.__code__.replace(co_name=f"captured_call_{next(_numbers)}")
    fresh = types.FunctionType(code, call.__globals__, code.co_name, None, call.__closure__)
    compiled = torch.compile(fresh, backend=recorder, fullgraph=True, dynamic=False)
    recorder.function = unbroken_by_logging(compiled)
    with clear_errors():
        recorder.run(None)
    if not recorder.joints:
        raise CaptureError("the model runs no tensor operation on this batch")
    return recorder
