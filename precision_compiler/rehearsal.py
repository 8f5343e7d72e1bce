"""Some steps of training before a plan is made, so that it is for more than the first step.

Relative errors of rounding change while a model trains: gradients of the first steps are unlike
all later ones. The steps run on the captured graph with weights of their own; the model keeps its.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError
from precision_compiler.joint import JointGraph
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
        AnalysisError: the loss is no longer finite; says what to do.
    """
    if steps < 1:
        return (*batches, *unseen)
    weights = _weights(batches[0].joint)
    optimizer = torch.optim.AdamW(weights.values(), lr=0.0, betas=_BETAS)
    rate = LEARNING_RATE if learning_rate is None else learning_rate
    for step in range(1, steps + 1):
        captured = batches[(step - 1) % len(batches)]
        progress(f"Rehearse step {step} of {steps}")
        loss, gradients = gradients_of(captured, inputs=_with(captured.joint, weights))
        if not loss.isfinite():
            raise AnalysisError(
                f"the loss is {float(loss)} at step {step} of the rehearsal: give the learning "
                "rate of the training, or a smaller one"
            )
        for name, gradient in zip(_owners(captured.joint), gradients, strict=True):
            if name in weights:
                weights[name].grad = gradient
        optimizer.param_groups[0]["lr"] = rate * step / steps
        optimizer.step()
    return tuple(_moved(captured, weights) for captured in (*batches, *unseen))


def _weights(joint: JointGraph) -> dict[str, torch.Tensor]:
    """Copies of the parameters that have gradients, by placeholder."""
    owners = set(_owners(joint))
    holders = joint.module.graph.find_nodes(op="placeholder")
    return {
        node.name: value.detach().clone().requires_grad_()
        for node, value in zip(holders, joint.inputs, strict=False)
        if node.name in joint.parameters and node.name in owners
    }


def _owners(joint: JointGraph) -> list[str]:
    """The placeholder that each of the graph's gradients belongs to."""
    results: Any = joint.module.graph.output_node().args[0]
    holders = joint.module.graph.find_nodes(op="placeholder")
    pairs = zip(holders, results[joint.outputs :], strict=False)
    return [holder.name for holder, node in pairs if isinstance(node, fx.Node)]


def _with(joint: JointGraph, weights: dict[str, torch.Tensor]) -> list[Any]:
    holders = joint.module.graph.find_nodes(op="placeholder")
    pairs = zip(holders, joint.inputs, strict=False)
    return [weights[node.name].detach() if node.name in weights else value for node, value in pairs]


def _moved(captured: Captured, weights: dict[str, torch.Tensor]) -> Captured:
    """A batch with other weights; the model itself, which has not moved, is out of reach."""
    joint = captured.joint.with_inputs(_with(captured.joint, weights))
    return replace(captured, joint=joint, again=None, gradients=None)
