"""Capturing: every way to give a batch and a loss, one line for every mistake, no trace left."""

import copy
import gc
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.capture import Captured, capture, capture_inference, captured_alone
from precision_compiler.errors import CaptureError
from precision_compiler.joint import trace_joint
from precision_compiler.replay import gradients_of
from tests.models import Case, Mlp, Output, captured, dropout, gpt, made


def test_a_model_is_traced_with_rare_collections_of_garbage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, (model, x, y) = list[tuple[int, int, int]](), mlp_batch()

    def noting(*args: Any) -> Any:
        inside.append(gc.get_threshold())
        return trace_joint(*args)

    monkeypatch.setattr("precision_compiler.capture.trace_joint", noting)
    before = gc.get_threshold()
    capture(model, (x, y))
    assert inside[0][0] > before[0]
    assert gc.get_threshold() == before


def loss_of(found: Captured) -> float:
    return gradients_of(found)[0].item()


def mlp_batch() -> tuple[Mlp, Tensor, Tensor]:
    torch.manual_seed(0)
    return Mlp(), torch.randn(32, 16), torch.randn(32, 16)


class Plain(nn.Module):
    """Returns whatever ``shape`` makes of its output."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.fc(x))


X = torch.linspace(-1, 1, 64).reshape(4, 16)


def test_tuple_list_and_dict_are_the_same_batch() -> None:
    model, x, y = mlp_batch()
    expected = model(x, y).item()
    for batch in ((x, y), [x, y], {"x": x, "y": y}, {"y": y, "x": x}, UserDict(x=x, y=y)):
        assert loss_of(capture(model, batch)) == pytest.approx(expected, rel=1e-6)


def test_tensor_is_the_only_argument() -> None:
    model = Plain(lambda y: y.square().mean())
    assert loss_of(capture(model, X)) == pytest.approx(model(X).item(), rel=1e-6)


@pytest.mark.parametrize(
    "shape",
    [
        lambda y: y.square().mean(),
        lambda y: y.square().mean().reshape(1, 1),
        lambda y: {"loss": y.square().mean(), "logits": y},
        lambda y: Output(y.square().mean(), y),
    ],
)
def test_loss_is_found_in_what_the_model_returns(shape: Callable[[Tensor], Any]) -> None:
    model = Plain(shape)
    found = capture(model, X)
    assert loss_of(found) == pytest.approx(model.fc(X).square().mean().item(), rel=1e-6)
    assert found.origin == "the model's own loss"


def test_loss_outside_gets_the_output_and_the_batch() -> None:
    seen: list[Any] = []

    def loss(output: Tensor, batch: Any) -> Tensor:
        seen.append(batch)
        return F.mse_loss(output, batch)

    model = Plain(lambda y: y)
    found = capture(model, X, loss)
    assert loss_of(found) == pytest.approx(F.mse_loss(model(X), X).item(), rel=1e-6)
    assert all(batch is X for batch in seen)
    assert found.origin == "loss(output, batch)"


def test_loss_of_several_outputs() -> None:
    def loss(output: tuple[Tensor, dict[str, Tensor]], batch: Any) -> Tensor:
        return output[0].mean() + output[1]["twice"].square().mean()

    model = Plain(lambda y: (y.tanh(), {"twice": 2 * y}))
    expected = loss(model(X), X)
    found = capture(model, X, loss)
    value, gradients = gradients_of(found)
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other)


def failing(y: Tensor) -> Tensor:
    raise ValueError("first line\nsecond line")


def breaking(y: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    return y.sum()


@pytest.mark.parametrize(
    ("shape", "batch", "message"),
    [
        (lambda y: y, X, "not a scalar but torch.float32 of shape (4, 16)"),
        (lambda y: y.argmax(), X, "not a scalar but torch.int64"),
        (lambda y: [y], X, "returns list, which holds no loss"),
        (lambda y: None, X, "returns NoneType, which holds no loss"),
        (lambda y: {"loss": None}, X, "returns dict, which holds no loss"),
        (lambda y: y.detach().sum(), X, "depends on no parameter"),
        (lambda y: y.sum(), torch.randn(4, 7), "fails on this batch (RuntimeError: mat1 and mat2"),
        (lambda y: y.sum(), (X, X), "fails on this batch (TypeError"),
        (lambda y: y.sum(), {"z": X}, "fails on this batch (TypeError"),
        (lambda y: y.sum(), 3, "not int: wrap it accordingly"),
        (lambda y: y.sum(), "abc", "not str: wrap it accordingly"),
        (lambda y: y.sum(), None, "not NoneType: wrap it accordingly"),
        (failing, X, "fails on this batch (ValueError: first line)"),
        (breaking, X, "cannot be captured as one graph"),
    ],
)
def test_mistake_is_one_line_that_names_it(
    shape: Callable[[Tensor], Any], batch: Any, message: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Plain(shape), batch)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_failing_loss_function_is_a_mistake_in_one_line() -> None:
    def loss(output: Any, batch: Any) -> Tensor:
        found: Tensor = output["logits"]
        return found.mean()

    with pytest.raises(CaptureError) as caught:
        capture(Plain(lambda y: y), X, loss)
    assert "\n" not in str(caught.value)


def test_branch_on_data_is_a_mistake_in_one_line() -> None:
    def shape(y: Tensor) -> Tensor:
        return y.sum() if y.sum() > 0 else -y.sum()

    with pytest.raises(CaptureError, match="cannot be captured as one graph") as caught:
        capture(Plain(shape), X)
    assert "\n" not in str(caught.value)


def test_model_without_any_operation_is_a_mistake() -> None:
    with pytest.raises(CaptureError):
        capture(nn.Identity(), X)


def test_frozen_model_has_nothing_to_train() -> None:
    model = Plain(lambda y: y.square().mean()).requires_grad_(False)
    with pytest.raises(CaptureError, match="depends on no parameter"):
        capture(model, X)


class Counting(nn.Module):
    """Buffers that change in every forward pass, and randomness."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        y: Tensor = self.drop(self.norm(self.fc(x)))
        return y.square().mean()


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("action", ["capture", "replay", "inference"])
def test_everything_is_left_as_it_was(action: str, training: bool) -> None:
    torch.manual_seed(3)
    model = Counting().train(training)
    model.drop.train(not training)  # modes of parts may differ
    model(X).backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    kept = {name: grad.clone() for name, grad in grads.items() if grad is not None}
    before, random, modes = state_of(model), torch.get_rng_state(), _modes(model)
    attributes = set(vars(model))
    if action == "inference":
        capture_inference(model, X)
    else:
        found = capture(model, X)
        if action == "replay":
            gradients_of(found)
    assert torch.equal(torch.get_rng_state(), random)
    assert _modes(model) == modes
    assert set(vars(model)) == attributes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, kept[name])
        assert type(parameter) is nn.Parameter


def _modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_everything_is_left_as_it_was_after_a_mistake() -> None:
    model = Counting()
    before, random = state_of(model), torch.get_rng_state()
    with pytest.raises(CaptureError):
        capture(model, torch.randn(4, 7, generator=torch.Generator()))
    with pytest.raises(CaptureError):
        capture_inference(model, torch.randn(4, 7, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_captured_dropout_draws_the_same_masks_in_every_replay() -> None:
    found = captured("dropout")
    first, second = gradients_of(found), gradients_of(found)
    assert torch.equal(first[0], second[0])
    for one, other in zip(first[1], second[1], strict=True):
        assert torch.equal(one, other)


def test_no_grad_around_the_call_does_not_matter() -> None:
    case = made("mlp")
    with torch.no_grad():
        found = capture(case.model, case.batch)
    assert not found.joint.inference


def test_parameters_and_inputs_are_named_as_in_the_model() -> None:
    joint = captured("gpt").joint
    holders = joint.module.graph.find_nodes(op="placeholder")
    named = dict(zip((node.name for node in holders), joint.names, strict=False))
    weights = {named[name] for name in joint.parameters}
    assert weights == {name for name, _ in made("gpt").model.named_parameters()}
    inputs = [name for name in joint.names if name not in weights]
    assert len(inputs) == len(set(joint.names)) - len(weights) == 2


def test_inference_graph_has_one_result_list_and_no_gradient() -> None:
    case = made("gpt")
    joint = capture_inference(case.model, case.batch)
    assert joint.inference
    holders = joint.module.graph.find_nodes(op="placeholder")
    assert not [node for node in holders if "tangents" in str(node.target)]
    assert joint.outputs == 1


def test_frozen_parameters_get_no_gradient() -> None:
    case = gpt()
    frozen = [name for name, _ in case.model.named_parameters() if "position" in name]
    for name in frozen:
        case.model.get_parameter(name).requires_grad_(False)
    found = capture(case.model, case.batch)
    trained = [value for value in case.model.parameters() if value.requires_grad]
    assert len(gradients_of(found)[1]) == len(trained)


def test_graph_without_a_batch_takes_its_scalar_for_the_loss() -> None:
    found = captured("mlp")
    alone = captured_alone(found.joint)
    one, other = gradients_of(found), gradients_of(alone)
    assert torch.equal(one[0], other[0])
    for first, second in zip(one[1], other[1], strict=True):
        assert torch.equal(first, second)


def test_graph_without_a_scalar_gets_a_fixed_combination() -> None:
    alone = captured_alone(captured("handwritten").joint)
    first, second = gradients_of(alone), gradients_of(alone)
    assert torch.equal(first[0], second[0])
    assert all(gradient.abs().sum() > 0 for gradient in first[1])


def test_warnings_and_logging_in_a_model_do_not_break_its_graph() -> None:
    import logging

    log = logging.getLogger("a.model")

    def shape(y: Tensor) -> Tensor:
        log.warning("told once more")
        return y.square().mean()

    assert not capture(Plain(shape), X).joint.inference


@pytest.mark.parametrize("make", [gpt, dropout])
def test_captures_follow_one_another_without_a_trace(make: Callable[[], Case]) -> None:
    case = make()
    names = [site.name for site in capture(case.model, case.batch).joint.sites]
    again = [site.name for site in capture(case.model, case.batch).joint.sites]
    assert again == names
