"""Predicted errors against the errors that rounding a tensor really causes."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.attention import substitutes
from precision_compiler.capture import Captured, capture
from precision_compiler.compiler import rewritten
from precision_compiler.errors import AnalysisError, InternalError
from precision_compiler.formats import FORMATS, Format, round_to, ulp
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.plan import Budget
from precision_compiler.replay import Replay, execute, gradients_of, relative_error
from precision_compiler.statistics import Sensitivity, Statistics
from tests import models
from tests.helpers import graph, joint_of, machine
from tests.models import MODELS, Case, captured, planned

Change = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]


def measured(found: Captured, seed: int = 0) -> Statistics:
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    assert not MeasureSensitivity(seed).run(unit)
    assert unit.statistics is not None
    return unit.statistics


def nearest(sensitivity: Sensitivity, fmt: Format) -> Callable[[Tensor], Tensor]:
    """Rounding as it would be done: a scaled format fills its range."""
    scale = 2.0 ** sensitivity.scale_exponent(fmt)
    return lambda value: (round_to(value.double() * scale, fmt) / scale).to(value.dtype)


@torch.no_grad()
def disturbed(found: Captured, run: Callable[..., Any]) -> list[Tensor]:
    """Gradients with ``run`` in place of every operation."""
    joint = found.joint
    with torch.random.fork_rng():
        torch.manual_seed(0)
        replay = Replay(joint.module, joint.inputs, joint.outputs, run)
        results = [
            value.detach().requires_grad_() if value.is_floating_point() else value
            for value in replay.forward()
        ]
        with torch.enable_grad():
            loss = found.objective(lambda: results)
            wanted = replay.tangents_needed(results)
            tangents = torch.autograd.grad(loss, wanted, materialize_grads=True)
        return [value for value in replay.backward(tangents) if value is not None]


def roundings(found: Captured, fmt: Format, every: int) -> list[tuple[str, float, float]]:
    """Single roundings in a model: what is rounded, its predicted and its real error."""
    stats, exact = measured(found), gradients_of(found)[1]
    links = find_links(found.joint)
    nodes = {site.name: site.node for site in found.joint.sites}
    trials: list[tuple[str, float, Callable[..., Any]]] = []

    def add(label: str, sensitivity: Sensitivity, run: Callable[..., Any]) -> None:
        predicted = sensitivity.variance(fmt) ** 0.5 / stats.gradient_norm
        trials.append((label, predicted, run))

    for store, sensitivity in stats.stores.items():
        add(store, sensitivity, _rounded_result(nodes[store], nearest(sensitivity, fmt)))
    for link in links.reads:
        sensitivity = stats.operands[link.contraction, link.argument]
        round_one = nearest(sensitivity, fmt)
        run = _rounded_argument(nodes[link.contraction], link.argument, round_one)
        add(f"{link.contraction}[{link.argument}]", sensitivity, run)
    for site, inside in stats.internals.items():
        for index, sensitivity in enumerate(inside):
            run = _rounded_inside(nodes[site], index, nearest(sensitivity, fmt))
            add(f"{site}({index})", sensitivity, run)
    return [
        (label, predicted, relative_error(disturbed(found, run), exact))
        for label, predicted, run in trials[::every]
    ]


def _rounded_result(name: str, rounding: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = execute(node, args, kwargs)
        return rounding(value) if node.name == name else value

    return run


def _rounded_argument(
    name: str, index: int, rounding: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name == name:
            args = (*args[:index], rounding(args[index]), *args[index + 1 :])
        return execute(node, args, kwargs)

    return run


def _rounded_inside(
    name: str, index: int, rounding: Callable[[Tensor], Tensor]
) -> Callable[..., Any]:
    formulas = substitutes()

    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node.name != name:
            return execute(node, args, kwargs)
        taps = iter(range(9))

        def tap(value: Tensor) -> Tensor:
            return rounding(value) if next(taps) == index else value

        return formulas[node.target](tap, *args, **kwargs)

    return run


def drawn(make: Callable[[], Case]) -> Captured:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        case = make()
    return capture(case.model, case.batch, case.loss)


@pytest.mark.parametrize(
    ("make", "fmt"),
    [
        (models.mlp, "bf16"),
        (models.mlp, "fp16"),
        (models.mlp, "e4m3"),
        (partial(models.gpt, batch=8, length=11, blocks=1), "bf16"),
        (models.llama, "bf16"),
        (partial(models.explicit, batch=8), "bf16"),
        (partial(models.vit, batch=32), "bf16"),
    ],
)
def test_predicted_error_of_every_rounding_is_the_real_one(
    make: Callable[[], Case], fmt: str
) -> None:
    every = 1 if make is models.mlp else 3  # of the larger models a third
    found = roundings(drawn(make), FORMATS[fmt], every)
    noise = 3e-6  # of float32 itself
    wrong = [
        f"{label}: predicted {predicted:.2e}, real {real:.2e}"
        for label, predicted, real in found
        if not (real / 2 - noise <= predicted <= 2 * real + noise)
        and not label.startswith("nll_loss")  # one number throughout: its errors are no noise
    ]
    assert len(found) > 10
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "vit"])
def test_predicted_error_of_a_whole_plan_is_the_real_one(name: str) -> None:
    found, plan = captured(name), planned(name)
    assert {"bf16", "fp16"} & set(plan.assignment.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        module = rewritten(found.joint, plan)
    real = relative_error(gradients_of(found, module)[1], gradients_of(found)[1])
    assert real / 2 <= plan.predicted_gradient_error <= 2 * real


class Slope(nn.Module):
    """A loss that is linear in its only parameter: gradients are sums of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(40, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).sum()


def test_error_of_a_linear_loss_is_the_error_of_the_inputs() -> None:
    """The gradient is the column sums of x: rounding x errs by the sum of ulp^2 / 12."""
    x = torch.randn(32, 40, generator=torch.Generator().manual_seed(0))
    found = capture(Slope(), x)
    stats = measured(found)
    assert stats.loss == pytest.approx(x.sum().item(), rel=1e-4)
    assert stats.gradient_norm == pytest.approx(x.sum(0).norm().item(), rel=1e-5)
    largest = x.abs().amax().item()
    (backward,) = [
        sensitivity
        for (site, _), sensitivity in stats.operands.items()
        if site == "linear.wgrad" and sensitivity.amax == largest
    ]
    for fmt in (FORMATS["bf16"], FORMATS["fp16"], FORMATS["tf32"]):
        expected = ulp(x, fmt).square().sum().item() / 12
        assert backward.variance(fmt) == pytest.approx(expected, rel=1e-6)
    for (site, _), sensitivity in stats.operands.items():
        if site == "linear.fprop":  # the gradient depends on nothing in the forward pass
            assert sensitivity.weight.sum() == 0


def test_tensors_that_no_input_reaches_are_measured_too() -> None:
    """The gradient of a mean starts from a constant; an error there scales every gradient."""
    stats = measured(captured("handwritten"))
    for sensitivity in stats.stores.values():
        assert sensitivity.amax > 0
    batch = torch.randn(32, 16)
    found = capture(nn.Linear(16, 4, bias=False), batch, lambda output, _: output.sum())
    operands = measured(found).operands
    assert all(o.weight.sum() > 0 for (site, _), o in operands.items() if site.endswith("wgrad"))


def test_same_seed_same_statistics_and_another_seed_about_the_same() -> None:
    found = captured("mlp")
    one, same, other = measured(found), measured(found), measured(found, seed=1)
    for name, sensitivity in one.stores.items():
        assert (sensitivity.weight == same.stores[name].weight).all()
        size = sensitivity.variance(FORMATS["bf16"])
        assert other.stores[name].variance(FORMATS["bf16"]) == pytest.approx(size, rel=0.7)


@pytest.mark.parametrize("name", MODELS)
def test_every_site_is_measured_and_the_model_left_alone(name: str) -> None:
    found = captured(name)
    inputs = [value.clone() if isinstance(value, Tensor) else value for value in found.joint.inputs]
    stats, links = measured(found), find_links(found.joint)
    assert set(stats.stores) == set(links.stores)
    assert set(stats.operands) == {(link.contraction, link.argument) for link in links.reads}
    for sensitivity in [*stats.stores.values(), *stats.operands.values()]:
        assert (sensitivity.weight >= 0).all()
        assert sensitivity.amax >= 0
    for value, before in zip(found.joint.inputs, inputs, strict=True):
        if isinstance(value, Tensor):
            assert torch.equal(value, before)
            assert value.grad is None


def test_loss_without_slope_is_an_error() -> None:
    found = capture(nn.Linear(4, 4), torch.zeros(2, 4), lambda output, _: (output * 0).sum())
    with pytest.raises(AnalysisError, match=r"gradient norm on this batch is 0\.0"):
        measured(found)


def test_infinite_gradient_is_an_error() -> None:
    found = capture(
        nn.Linear(4, 4), torch.full((2, 4), torch.inf), lambda output, _: output.square().sum()
    )
    with pytest.raises(AnalysisError, match="gradient norm on this batch is"):
        measured(found)


def test_graph_without_inputs_is_our_bug() -> None:
    joint = joint_of(graph("x:f32[4,4] | a = mm x x | return a"))
    with pytest.raises(InternalError):
        MeasureSensitivity().run(Unit(joint, machine(), Budget.parse(1.0), Journal()))
