"""A model and a batch become one joint graph with real inputs, and the way to its loss."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from precision_compiler.calling import (
    Loss,
    apart,
    call_model,
    clear_errors,
    left_as_it_was,
    loss_of,
    plain_operations,
    unbroken_by_logging,
)
from precision_compiler.errors import AnalysisError, CaptureError
from precision_compiler.heap import rarely_collected
from precision_compiler.joint import JointGraph, trace_joint
from precision_compiler.paper import has_no_weights, on_paper

Forward = Callable[[], Sequence[Any]]


@dataclass
class Captured:
    """A joint graph and the way from its forward results to the loss.

    Attributes:
        joint: the graph and its inputs.
        objective: takes a function that computes the forward results and returns the loss,
            connected to them by autograd.
        origin: a sentence on where the loss comes from.
        again: captures the same model on another batch; None where the model is not at hand.
        batch: what the model was called with.
        gradients: the gradients of the model's parameters on another batch of any size, by the
            model itself.
    """

    joint: JointGraph
    objective: Callable[[Forward], torch.Tensor]
    origin: str
    again: "Callable[[Any], Captured] | None" = None
    batch: Any = None
    gradients: Callable[[Any], Sequence[torch.Tensor]] | None = None

    def on(self, batch: Any) -> "Captured":
        """The same model on another batch; the same graph if the batch has the same shapes.

        Raises:
            CaptureError: the model fails on that batch, or is not at hand.
        """
        if self.again is None:
            raise CaptureError("only a model captured with capture(model, batch) can change batch")
        return self.again(batch)


def capture(model: nn.Module, batch: Any, loss: Loss | None = None) -> Captured:
    """Capture the training graph of a model on a batch; the model is left as it was.

    Of a model with weights on the meta device, only the graph is captured.

    Raises:
        CaptureError: the model fails on the batch, breaks into several graphs, or there is no
            scalar loss.
    """
    if has_no_weights(model):
        return _captured_on_paper(model, batch, loss)
    recorder = _Recorder(model)
    origin = "loss(output, batch)" if loss is not None else "the model's own loss"

    def gradients(other: Any) -> Sequence[torch.Tensor]:
        with left_as_it_was(model), torch.enable_grad(), clear_errors():
            value = loss_of(call_model(model, other), other, loss)
            wanted = [p for p in model.parameters() if p.requires_grad]
            return torch.autograd.grad(value, wanted, allow_unused=True, materialize_grads=True)

    def on(other: Any) -> Captured:
        with left_as_it_was(model), torch.enable_grad():
            with clear_errors():
                loss_of(call_model(model, other), other, loss)
            joint = recorder.trace(other)

        def objective(forward: Forward) -> torch.Tensor:
            with left_as_it_was(model), torch.enable_grad():
                return loss_of(recorder.run(other, forward), other, loss)

        return Captured(joint, objective, origin, on, other, gradients)

    return on(batch)


def _captured_on_paper(model: nn.Module, batch: Any, loss: Loss | None) -> Captured:
    """The graph alone: nothing can be run."""

    def objective(_forward: Forward) -> torch.Tensor:
        raise AnalysisError("a model on the meta device has no values: nothing can be measured")

    twin, pretended = on_paper(model, batch)
    origin = "loss(output, batch)" if loss is not None else "the model's own loss"
    return Captured(_Recorder(twin).trace(pretended), objective, origin, None, pretended)


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
            return _Recorder(model).trace(batch)
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
    """A Dynamo backend that traces joint graphs of one model and lets others supply results."""

    def __init__(self, model: nn.Module) -> None:
        self.joints: list[JointGraph] = []
        self.forward: Forward | None = None
        self.ran: tuple[int, Sequence[Any]] | None = None
        batch: Any = None

        def call() -> Any:
            return call_model(model, batch)

        fresh = apart(call)
        assert call.__closure__ is not None
        self._batch = call.__closure__[call.__code__.co_freevars.index("batch")]
        compiled = torch.compile(fresh, backend=self, fullgraph=True, dynamic=False)
        self.function = unbroken_by_logging(compiled)

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        position = len(self.joints)
        self.joints.append(trace_joint(module, inputs))

        def run(*values: Any) -> Sequence[Any]:
            self.ran = position, values
            return self.forward() if self.forward is not None else module(*values)

        return run

    def trace(self, batch: Any) -> JointGraph:
        """The joint graph of the model on a batch, traced only if its shapes are new."""
        self.ran = None
        with clear_errors(), rarely_collected():
            self.run(batch, None)
        if self.ran is None:
            raise CaptureError("the model runs no tensor operation on this batch")
        position, values = self.ran
        return self.joints[position].with_inputs(values)

    def run(self, batch: Any, forward: Forward | None) -> Any:
        """Call the model with the graph's results computed by ``forward``."""
        self._batch.cell_contents, self.forward = batch, forward
        try:
            return self.function()
        finally:
            self._batch.cell_contents = self.forward = None
