"""Flags where they matter: norms of large activations, overflows, whole models."""

from math import isfinite

import pytest
import torch
from torch import Tensor, nn

from precision_compiler.budget import Budget
from precision_compiler.capture import capture
from precision_compiler.flags import FLAGS
from precision_compiler.formats import FORMATS
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.analyse.raise_flags import RaiseFlags
from precision_compiler.pipeline import Unit
from tests.helpers import machine
from tests.models import planned


class Norm(nn.Module):
    """Root-mean-square norm of activations with an outlier, as the layers of SmolLM2 have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.gain = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.gain


def analysed(model: nn.Module, x: Tensor) -> Unit:
    found = capture(model, x, lambda output, _: output.square().mean())
    unit = Unit(found.joint.copy(), machine(), Budget.parse(1.0), Journal(), found)
    MeasureSensitivity().run(unit)
    RaiseFlags().run(unit)
    return unit


def test_square_of_large_activations_fits_neither_fp16_nor_e4m3() -> None:
    x = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)) * 3.92
    x[:, 5] = 2.37e4
    unit = analysed(nn.Sequential(Norm(64), nn.Linear(64, 8)), x)
    assert unit.statistics is not None
    seen = unit.statistics.ranges["0.pow"]
    assert seen.amax == pytest.approx(5.6e8, rel=0.01)
    assert x.square().median() == pytest.approx(7.0, rel=0.1)
    forward = {(site, fmt): why for (site, fmt), why in unit.vetoes.items() if "grad" not in site}
    flushed = forward.pop(("0.pow", "e4m3"))
    assert flushed.startswith("flush: 98")
    assert {site for site, fmt in forward if fmt == "fp16"} == {"0.pow", "0.mean", "0.add"}
    assert all(forward[site, "fp16"].startswith("overflow") for site in ("0.pow", "0.mean"))
    assert ("0.mul.store", "fp16") not in unit.vetoes  # x itself


@pytest.mark.parametrize("name", ["explicit", "mlp"])
def test_flags_of_models_are_known_one_line_and_the_source_of_every_veto(name: str) -> None:
    plan = planned(name)
    assert plan.flags
    for flag in plan.flags:
        assert flag.name in FLAGS
        assert flag.format is None or flag.format in FORMATS
        assert "\n" not in flag.sentence
    vetoed = {(flag.site, flag.format) for flag in plan.flags if flag.veto}
    for site, choice in plan.sites.items():
        vetoes = {fmt: one.veto for fmt, one in choice.options.items() if one.veto}
        assert {fmt for fmt, why in vetoes.items() if not why.startswith("support: ")} == {
            fmt for place, fmt in vetoed if place == site
        }


def test_numbers_stay_finite_where_a_single_element_overflows() -> None:
    """Rounded to fp16 it is an infinity, and so would the predicted error be."""
    x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)) * 1e6
    unit = analysed(nn.Linear(40, 1), x)
    overflow = [f for f in unit.flags if (f.name, f.format) == ("overflow", "fp16")]
    assert any(flag.numbers["amax"] > 65504 for flag in overflow)
    for flag in unit.flags:
        assert all(isfinite(number) for number in flag.numbers.values()), flag
