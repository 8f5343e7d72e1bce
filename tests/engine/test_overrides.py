"""Formats that the user insists on: they hold, are explained, and mistakes are named."""

from pathlib import Path

import pytest

from precision_compiler import PlanError, make_plan
from precision_compiler.explain import explain
from precision_compiler.overrides import read_overrides
from precision_compiler.plan import Plan
from precision_compiler.thaw import problem_of
from tests.helpers import machine
from tests.models import made

TARGET = machine(fp32=1e12, bf16=4e12, e4m3=1.2e13)


def planned(overrides: dict[str, str], budget: float = 0.05) -> Plan:
    case = made("gpt")
    return make_plan(case.model, case.batch, target=TARGET, budget=budget, overrides=overrides)


def test_overrides_hold_and_are_the_reason() -> None:
    plan = planned({"blocks.*.fc.wgrad": "keep fp32", "blocks.0.proj.fprop": "e4m3"})
    for name in ("blocks.0.fc.wgrad", "blocks.1.fc.wgrad"):
        assert plan.sites[name].format == "fp32"
        assert plan.sites[name].reason == "set by the override 'blocks.*.fc.wgrad'"
    assert plan.sites["blocks.0.proj.fprop"].format == "e4m3"
    assert problem_of(plan).options["blocks.0.fc.wgrad"] == ("fp32",)
    found = explain(plan, "blocks.0.proj.fprop")
    assert found.binding == "override"
    assert "blocks.0.proj.fprop" in found.sentence
    assert Plan.from_json(plan.to_json()) == plan


def test_everything_else_is_decided_anew() -> None:
    free, bound = planned({}), planned({"blocks.*.fc.*": "fp32"})
    assert bound.predicted_seconds >= free.totals.bound_seconds
    changed = [one.site for one in free.diff(bound)]
    assert any(".fc." in site for site in changed)
    assert bound.predicted_gradient_error <= 0.05


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"blocks.*.fcc.wgrad": "bf16"}, r"matches no site; did you mean blocks\.\d\.fc"),
        ({"blocks.*.fc.wgrad": "bf61"}, r"unknown format 'bf61' \(did you mean bf16\?\)"),
        ({"blocks.*.fc.wgrad": "mxfp8"}, "cannot be mxfp8 on this target; choose one of fp32"),
        ({"blocks.0.add.store": "e4m3"}, "cannot be e4m3 on this target"),
        (
            {"blocks.*.fc.*": "bf16", "blocks.1.fc.wgrad": "fp32"},
            "contradict each other at blocks.1.fc.wgrad: 'blocks.\\*.fc.\\*' asks for bf16",
        ),
    ],
)
def test_mistakes_are_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        planned(overrides)


def test_a_file_of_overrides(tmp_path: Path) -> None:
    path = tmp_path / "overrides.toml"
    path.write_text('"blocks.*.fc.wgrad" = "bf16"\n"head.*" = "keep fp32"\n')
    assert read_overrides(path) == {"blocks.*.fc.wgrad": "bf16", "head.*": "keep fp32"}


@pytest.mark.parametrize(
    ("text", "message"),
    [('"a" = 3', "key a: give a format in quotes"), ("a = ", "not valid TOML")],
)
def test_files_that_are_no_overrides(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "overrides.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_overrides(path)
    with pytest.raises(PlanError, match="cannot read the overrides"):
        read_overrides(tmp_path / "missing.toml")
