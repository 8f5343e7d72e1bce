"""Predicted errors against the errors that rounding a tensor really causes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.attention import substitutes
from precision_compiler.capture import Captured, capture
from precision_compiler.compiler import plan_for, rewritten
from precision_compiler.errors import AnalysisError, InternalError
from precision_compiler.formats import FORMATS, Format, round_to, ulp
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Unit
from precision_compiler.plan import Budget
from precision_compiler.replay import Replay, execute, gradients_of, relative_error
from precision_compiler.statistics import Sensitivity, Statistics
from tests.helpers import graph, joint_of, machine
from tests.models import MODELS, Case, captured, made

Change = Callable[[fx.Node, tuple[Any, ...]], tuple[Any, ...]]


def measured(found: Captured, seed: int = 0) -> Statistics:
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    assert not MeasureSensitivity(seed).run(unit)
    assert unit.statistics is not None
    return unit.statistics


@cache
def statistics(name: str) -> Statistics:
    return measured(captured(name))


@cache
def reference(name: str) -> list[Tensor]:
    return gradients_of(captured(name))[1]


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


def cases(name: str, fmt: Format) -> list[tuple[str, float, float]]:
    """Every single rounding in a model: what is rounded, its predicted and its real error."""
    found, stats = captured(name), statistics(name)
    links = find_links(found.joint)
    nodes = {site.name: site.node for site in found.joint.sites}
    results: list[tuple[str, float, float]] = []

    def add(label: str, sensitivity: Sensitivity, run: Callable[..., Any]) -> None:
        predicted = sensitivity.variance(fmt) ** 0.5 / stats.gradient_norm
        results.append((label, predicted, relative_error(disturbed(found, run), reference(name))))

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
    return results


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


@pytest.mark.parametrize("fmt", ["bf16", "e4m3"])
@pytest.mark.parametrize("name", ["mlp", "gpt", "llama", "explicit", "vit"])
def test_predicted_error_of_every_rounding_is_the_real_one(name: str, fmt: str) -> None:
    found = cases(name, FORMATS[fmt])
    noise = 3e-6  # of float32 itself
    for label, predicted, real in found:
        print(f"{predicted / max(real, 1e-12):6.2f} {predicted:.2e} {real:.2e} {label}")
    wrong = [
        f"{label}: predicted {predicted:.2e}, real {real:.2e}"
        for label, predicted, real in found
        if not (real / 2 - noise <= predicted <= 2 * real + noise)
    ]
    assert not wrong, "\n".join(wrong)


