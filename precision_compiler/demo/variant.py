"""One way of training the model, and what is measured of it."""

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from precision_compiler.demo.text import Batch


@dataclass
class Variant:
    """A compiled model with its optimizer.

    Attributes:
        name: what the table calls it.
        model: compiled in place; its forward returns the loss.
        autocast: whether it is called under `torch.autocast` in bf16.
        step_seconds: time of each timed training step.
        validation: held-out loss at each evaluation.
        gradient_error: measured against fp32 at the initial weights.
        saved_bytes: memory that one forward pass keeps for the backward pass.
    """

    name: str
    model: nn.Module
    autocast: bool = False
    step_seconds: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    gradient_error: float = 0.0
    saved_bytes: int = 0

    def __post_init__(self) -> None:
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def loss(self, batch: Batch) -> Tensor:
        """The loss of one forward pass, with its graph."""
        with self._precision():
            loss: Tensor = self.model(*batch)
        return loss

    def gradient(self, batch: Batch) -> Tensor:
        """The gradient of all parameters as one vector."""
        self._optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        parts = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self._optimizer.zero_grad(set_to_none=True)
        return torch.cat(parts)

    def step(self, batch: Batch, learning_rate: float) -> float:
        """One training step; returns the seconds that it took."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        started = time.perf_counter()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return time.perf_counter() - started

    def validate(self, batches: Sequence[Batch]) -> float:
        """Mean loss over `batches`.

        Gradients stay enabled, so that the graph that trains is the graph that is judged.
        """
        return statistics.fmean(float(self.loss(batch).detach()) for batch in batches)

    def measure_saved_bytes(self, batch: Batch) -> None:
        """Counts what the forward pass saves, once per storage, without parameters and inputs."""
        owned = [*self.model.parameters(), *self.model.buffers(), *batch]
        known = {tensor.untyped_storage().data_ptr() for tensor in owned}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = self.loss(batch)
        self.saved_bytes = sum(size for place, size in kept.items() if place not in known)
        del loss

    def median_seconds(self) -> float:
        """Median time of a step."""
        return statistics.median(self.step_seconds)

    def _precision(self) -> AbstractContextManager[object]:
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else nullcontext()


def relative_error(found: Tensor, exact: Tensor) -> float:
    """`||found - exact|| / ||exact||`, summed in float64."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())
