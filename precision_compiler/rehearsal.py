"""Some steps of training before a plan is made, so that it is for more than the first step.

Relative errors of rounding change while a model trains: gradients of the first steps are unlike
all later ones. The steps run on the captured graph with weights of their own; the model keeps its.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError
from precision_compiler.pipeline import Progress, silent
from precision_compiler.replay import gradients_of

LEARNING_RATE = 3e-4
"""Of AdamW where none is given; it rises from zero over the steps."""
_BETAS = (0.9, 0.95)


def rehearse(
    batches: Sequence[Captured],
    unseen: Sequence[Captured],
    steps: int,
    learning_rate: float | None = None,
    progress: Progress = silent,
) -> tuple[Captured, ...]:
    """All the batches, with the weights as they are after some steps of AdamW in float32.

    Args:
        batches: of one model, trained on in turn.
        unseen: of the same model, not trained on.
        steps: how many; 0 changes nothing.
        learning_rate: of the last step.
        progress: called with a short sentence now and then.

    Raises:
        AnalysisError: the model has no weights, or its loss is no longer finite; says what to do.
    """
    if steps < 1:
        return (*batches, *unseen)
    first = batches[0].joint
    if not first.has_values:
        raise AnalysisError("a model on the meta device has no weights: leave the rehearsal out")
    owners = set(first.goal_holders)
    weights = {
        name: value.detach().clone()
        for name, value in first.parameter_values.items()
        if name in owners
    }
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=_BETAS)
    rate = LEARNING_RATE if learning_rate is None else learning_rate
    for step in range(1, steps + 1):
        captured = batches[(step - 1) % len(batches)]
        progress(f"Rehearse step {step} of {steps}")
        loss, gradients = gradients_of(captured, inputs=captured.joint.inputs_with(weights))
        if not loss.isfinite():
            raise AnalysisError(
                f"the loss is {float(loss)} at step {step} of the rehearsal: give the learning "
                "rate of the training, or a smaller one"
            )
        for name, gradient in zip(captured.joint.goal_holders, gradients, strict=True):
            if name in weights:
                weights[name].grad = gradient
        optimizer.param_groups[0]["lr"] = rate * step / steps
        optimizer.step()
    return tuple(_moved(captured, weights) for captured in (*batches, *unseen))


def _moved(captured: Captured, weights: Mapping[str, torch.Tensor]) -> Captured:
    """A batch with other weights; the model itself, which has not moved, is out of reach."""
    joint = captured.joint.with_inputs(captured.joint.inputs_with(weights))
    return replace(captured, joint=joint, again=None, gradients=None)
