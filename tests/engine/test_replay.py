"""Replay: the captured graph gives the model's own loss and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.calling import call_model, loss_of
from precision_compiler.capture import capture
from precision_compiler.errors import AnalysisError
from precision_compiler.graph import contraction_rule, copied
from precision_compiler.replay import Replay, execute, gradients_of, relative_error
from tests.helpers import graph
from tests.models import MODELS, captured, made

DETERMINISTIC = [name for name in MODELS if name != "dropout"]


def by_autograd(name: str) -> tuple[Tensor, list[Tensor]]:
    case = made(name)
    loss = loss_of(call_model(case.model, case.batch), case.batch, case.loss)
    return loss, list(torch.autograd.grad(loss, list(case.model.parameters())))


def in_model_order(name: str, gradients: list[Tensor]) -> list[Tensor]:
    """A replay's gradients, which follow the graph's inputs, in the order of the model."""
    joint = captured(name).joint
    holders = joint.module.graph.find_nodes(op="placeholder")
    paths = [
        path
        for path, node in zip(joint.names, holders, strict=False)
        if node.name in joint.parameters
    ]
    found = dict(zip(paths, gradients, strict=True))
    return [found[path] for path, _ in made(name).model.named_parameters()]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gradients_are_those_of_autograd(name: str) -> None:
    loss, expected = by_autograd(name)
    value, gradients = gradients_of(captured(name))
    assert value.item() == pytest.approx(loss.item(), rel=1e-6)
    found = in_model_order(name, gradients)
    assert relative_error(found, expected) < 1e-6
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape


def test_dropout_gradients_are_the_derivative_of_the_loss_under_the_same_masks() -> None:
    """One parameter moved by hand: replays draw the same masks, so the loss follows its slope."""
    case = made("dropout")
    found = capture(case.model, case.batch)
    loss, gradients = gradients_of(found)
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    step = 1e-3
    with torch.no_grad():
        for value, gradient in zip(_parameters(found.joint.inputs), gradients, strict=True):
            value += step * gradient / norm
    moved, _ = gradients_of(found)
    assert (moved - loss).item() / step == pytest.approx(norm.item(), rel=0.02)


def _parameters(inputs: list[Any]) -> list[Tensor]:
    return [value for value in inputs if isinstance(value, nn.Parameter)]


@pytest.mark.parametrize("name", MODELS)
def test_copied_graph_gives_the_same_bits(name: str) -> None:
    found = captured(name)
    one, other = gradients_of(found), gradients_of(found, copied(found.joint.module))
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


def test_every_operation_runs_once_and_can_be_replaced() -> None:
    joint = captured("handwritten").joint
    seen: list[fx.Node] = []

    def count(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        seen.append(node)
        return execute(node, args, kwargs)

    with torch.no_grad():
        replay = Replay(joint.module, joint.inputs, joint.outputs, count)
        results = replay.forward()
        assert not any("tangents" in str(source) for node in seen for source in node.args)
        forward = len(seen)
        replay.backward([torch.ones_like(value) for value in results[:1]])
    calls = [node for node in joint.module.graph.nodes if node.op == "call_function"]
    assert len(seen) == len(set(seen)) == len(calls)
    assert any(contraction_rule(node) is not None for node in seen[forward:])


@pytest.mark.parametrize("name", ["gpt", "dropout"])
def test_some_gradients_alone_are_the_same_and_take_fewer_products(name: str) -> None:
    found = captured(name)
    runs: list[list[fx.Node]] = [[], []]

    def counting(calls: list[fx.Node]) -> Callable[..., Any]:
        def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            calls.append(node)
            return execute(node, args, kwargs)

        return run

    loss, every = gradients_of(found, run=counting(runs[0]))
    same, some = gradients_of(found, run=counting(runs[1]), only=[3, 1])
    assert torch.equal(loss, same)
    assert [torch.equal(a, b) for a, b in zip(some, (every[1], every[3]), strict=True)] == [
        True
    ] * 2
    products = [sum(contraction_rule(node) is not None for node in calls) for calls in runs]
    assert products[1] < products[0]


def test_buffers_stay_the_users() -> None:
    model = nn.BatchNorm1d(8)
    found = capture(model, torch.randn(16, 8), lambda output, batch: output.square().mean() + 0)
    before = [buffer.clone() for buffer in model.buffers()]
    gradients_of(found)
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_too_few_differentiable_results_are_an_error() -> None:
    module = graph("x:f32[4] tangents_1:f32[4] tangents_2:f32[4] | a = relu x | return a none")
    replay = Replay(module, [torch.ones(4)], 1)
    with pytest.raises(AnalysisError, match="takes 2 output gradients but has 1"):
        replay.tangents_needed(replay.forward())


def test_relative_error_counts_all_tensors_together() -> None:
    reference = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert relative_error(reference, reference) == 0.0
    assert relative_error([torch.tensor([3.0]), torch.tensor([[4.5]])], reference) == 0.1
    assert relative_error([torch.tensor([1e30]), torch.tensor([[4.0]])], reference) > 1e29
    assert relative_error([torch.zeros(2)], [torch.zeros(2)]) == float("inf")
