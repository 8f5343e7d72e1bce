"""Running sums in narrow formats: predicted errors against sums that are really kept in them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from precision_compiler.accumulation import (
    Accumulator,
    partial_sum_variance,
    products,
    same_sign_terms,
)
from precision_compiler.budget import Budget
from precision_compiler.formats import FORMATS, round_to
from precision_compiler.graph import contraction_rule
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.analyse.raise_flags import RaiseFlags
from precision_compiler.pipeline import Unit
from precision_compiler.replay import execute, gradients_of, relative_error
from precision_compiler.target import Target
from tests.helpers import machine
from tests.models import captured

EVERY = 4


def kept_in(name: str, terms: Tensor, every: int) -> Tensor:
    """Sums over the last dimension, rounded whenever ``every`` terms were added."""
    total = torch.zeros(terms.shape[:-1])
    for start in range(0, terms.shape[-1], every):
        total = round_to(total + terms[..., start : start + every].sum(-1), FORMATS[name])
    return total


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("every", [1, 4, 32])
def test_variance_is_that_of_sums_kept_in_the_format(name: str, every: int) -> None:
    terms = torch.randn(4000, 256, generator=torch.Generator().manual_seed(every))
    error = kept_in(name, terms, every).double() - terms.double().sum(-1)
    predicted = partial_sum_variance(terms, Accumulator(FORMATS[name], every)).mean()
    assert error.square().mean().item() == pytest.approx(predicted.item(), rel=0.1)


def test_terms_of_one_sign_are_told_from_those_that_cancel() -> None:
    terms = torch.randn(100, 1024, generator=torch.Generator().manual_seed(0))
    assert same_sign_terms(terms.abs()) == pytest.approx(1024 * (2 / torch.pi) ** 0.5, rel=0.01)
    assert same_sign_terms(terms) < 40  # the root of 1024, about
    assert same_sign_terms(torch.zeros(3, 8)) == 0.0


@pytest.mark.parametrize("batch", [(), (3,)])
def test_products_add_up_to_the_matrix_product(batch: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(*batch, 5, 7, generator=generator, dtype=torch.float64)
    second = torch.randn(*batch, 7, 4, generator=generator, dtype=torch.float64)
    whole = first @ second
    chosen = torch.arange(0, whole.numel(), 3)
    found = products(first, second, chosen, tuple(whole.shape)).sum(-1)
    torch.testing.assert_close(found, whole.reshape(-1)[chosen])


def narrow_sums() -> Target:
    """A target that adds products up in bf16, four at a time."""
    known = machine()
    rate = replace(known.formats["bf16"], accumulate="bf16", accumulate_every=EVERY)
    return replace(known, formats={**known.formats, "bf16": rate})


@pytest.mark.parametrize("model", ["mlp", "gpt", "llama"])
def test_gradient_error_of_narrow_sums_is_predicted(model: str) -> None:
    found = captured(model)
    unit = Unit(found.joint.copy(), narrow_sums(), Budget.parse(1.0), Journal(), found)
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    sums = unit.statistics.accumulations
    sites = {site.node: name for name, site in unit.links.contractions.items()}

    def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rule = contraction_rule(node)
        if rule is None or (sites.get(node.name), "bf16") not in sums:
            return execute(node, args, kwargs)
        first, second = (args[index] for index in rule.operands)
        terms = first.unsqueeze(-2) * second.transpose(-1, -2).unsqueeze(-3)
        total = kept_in("bf16", terms, EVERY)
        return total + args[0] if rule.companions else total

    measured = relative_error(gradients_of(found, run=run)[1], gradients_of(found)[1])
    predicted = sum(one.variance for one in sums.values()) ** 0.5
    assert predicted > 1e-3
    assert measured == pytest.approx(predicted, rel=0.3)
    RaiseFlags().run(unit)
    flagged = {flag.site for flag in unit.flags if flag.name == "accumulation"}
    assert flagged == {site for site, _ in sums}


def test_float32_sums_cost_nothing() -> None:
    found = captured("mlp")
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    assert not unit.statistics.accumulations
