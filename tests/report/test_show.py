"""A plan as tables: layers with the same formats share a row, totals come first."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from precision_compiler.budget import Budget
from precision_compiler.calibrated import Calibrated
from precision_compiler.flags import Flag
from precision_compiler.outcomes import MeasuredError, Totals, Trial, Verification
from precision_compiler.plan import SCHEMA_VERSION, Option, Plan, SiteChoice
from precision_compiler.report.show import (
    contraction_rows,
    layer_ranges,
    milliseconds,
    show_plan,
)


def site(kind: str, role: str, name: str) -> SiteChoice:
    assert kind in ("contraction", "storage")
    return SiteChoice(
        kind=kind,  # type: ignore[arg-type]
        role=role,  # type: ignore[arg-type]
        op="mm",
        signature="mm[4, 4]",
        shape=(8, 16),
        format=name,
        reason="the fastest within the budget",
        seconds=0.001,
        error=0.002,
        variance_share=0.125,
        options={name: Option(0.001, 0.002)},
    )


@pytest.fixture
def plan() -> Plan:
    sites = {
        f"blocks.{layer}.fc.{role}": site(
            "contraction", role, "fp32" if layer == 2 and role == "wgrad" else "bf16"
        )
        for layer in range(4)
        for role in ("fprop", "dgrad", "wgrad")
    }
    sites["head.fprop"] = site("contraction", "fprop", "e4m3")
    sites["blocks.0.fc.store"] = site("storage", "store", "bf16")
    sites["head.store"] = site("storage", "store", "fp32")
    return Plan(
        schema_version=SCHEMA_VERSION,
        target="h100",
        budget=Budget("autocast", 0.0083, "scored"),
        fingerprint="0123456789abcdef",
        loss_origin="the model's own loss",
        versions={},
        totals=Totals(
            0.312, 0.0081, 0.310, 0.0064, 0.788, 0.315, 0.0083, 73, 1e-4, None, 0.7, 2.5, 1
        ),
        sites=sites,
        nodes=(),
        journal=(),
    )


def printed(plan: Plan, *, every_site: bool = False) -> str:
    stream = io.StringIO()
    show_plan(plan, Console(file=stream, width=160), every_site=every_site)
    return stream.getvalue()


def test_layers_with_the_same_formats_share_a_row(plan: Plan) -> None:
    rows = contraction_rows(plan.sites)
    assert [(row.module, row.layers, row.formats) for row in rows] == [
        ("blocks.*.fc", (0, 1, 3), ("bf16", "bf16", "bf16")),
        ("blocks.*.fc", (2,), ("bf16", "bf16", "fp32")),
        ("head", (), ("e4m3", None, None)),
    ]
    assert rows[0].seconds == pytest.approx(0.009)
    assert rows[0].variance_share == pytest.approx(9 * 0.125)


def test_totals_come_first_and_compare(plan: Plan) -> None:
    first, second, third, fourth = printed(plan).splitlines()[:4]
    assert "312 ms" in first
    assert "fp32 788 ms = 2.53x" in first
    assert "autocast 315 ms = 1.01x" in first
    assert "0.0081 predicted, 0.0083 allowed by budget autocast" in second
    assert third.split() == ["budget", "0.0083:", "scored"]
    assert "310 ms: gap 0.6%" in fourth


def test_memory_is_told_in_units_people_read(plan: Plan) -> None:
    totals = replace(
        plan.totals,
        activation_bytes=7.5e9,
        fp32_activation_bytes=1.5e10,
        autocast_activation_bytes=9e9,
    )
    lines = printed(replace(plan, totals=totals)).splitlines()
    told = " ".join(line.strip() for line in lines)
    assert "7.5 GB kept for the backward pass, 50% less than fp32 (autocast 9 GB)" in told


SECONDS = {"plan": 0.7, "fp32": 1.5, "autocast": 0.9}


@pytest.mark.parametrize(
    ("trial", "words"),
    [
        (None, "718 ms per step predicted (calibrated by the trial: 2.00 of the sum of prices and "
         "94 ms), not measured"),
        (Trial(SECONDS, "plan", "why", {}, ("fp32", "autocast")),
         "718 ms per step predicted (calibrated by the trial: 2.00 of the sum of prices and 94 ms)"
         ", measured 700 ms"),
        (Trial(SECONDS, "autocast", "why", {}, ("fp32", "autocast")),
         "measured 900 ms per step: this is one of the steps that calibrate, not a prediction"),
    ],
)  # fmt: skip
def test_calibrated_step_time_says_what_is_predicted_and_what_measured(
    plan: Plan, trial: Trial | None, words: str
) -> None:
    assert "calibrated" not in printed(plan)
    totals = replace(plan.totals, calibrated=Calibrated(2.0, 0.094))
    second = printed(replace(plan, totals=totals, trial=trial)).replace("\n", " ")
    assert words in " ".join(second.split())


MEASURED = MeasuredError(0.0123, 0.008, 0.034, {"w": 0.034}, (), 2.5, -3e-4, 1e-4)


@pytest.mark.parametrize(
    ("held_out", "passed", "words"),
    [
        (True, True, "0.012 on a held-out batch, 0.034 per tensor, loss -0.0003 (sigma 0.0001"),
        (False, False, "on the calibration batch"),
        (False, False, "outside of what was promised"),
    ],
)
def test_verified_plan_shows_what_was_measured(
    plan: Plan, held_out: bool, passed: bool, words: str
) -> None:
    assert "measured" not in printed(plan)
    verified = replace(plan, verification=Verification(MEASURED, held_out, 1, {}, passed))
    line = printed(verified).splitlines()[2]
    assert line.startswith("measured")
    assert words in line
    assert ("outside" in line) != passed


def test_flags_are_counted_and_one_that_vetoes_is_shown(plan: Plan) -> None:
    assert "Flags" not in printed(plan)
    flags = (
        Flag("flush", "a.store", "fp16", "half is gone", {}, False),
        Flag("flush", "b.store", "fp16", "all is gone", {}, True),
        Flag("trust-region", "", None, "large error", {}, False),
    )
    table = printed(replace(plan, flags=flags)).partition("Flags")[2]
    (flush,) = [line for line in table.splitlines() if "flush" in line]
    assert [word for word in flush.split() if word.isdigit()] == ["2", "1"]
    assert "b.store in fp16: all is gone" in flush
    assert " large error" in table


def test_storage_is_counted_by_format(plan: Plan) -> None:
    storage = printed(plan).partition("Storage")[2]
    assert "bf16" in storage
    assert "50.0%" in storage


def test_every_site_is_listed_only_on_request(plan: Plan) -> None:
    assert "blocks.3.fc.dgrad" not in printed(plan)
    listed = printed(plan, every_site=True)
    assert all(name in listed for name in plan.sites)
    assert "the fastest within the budget" in listed


@pytest.mark.parametrize(
    ("layers", "text"), [((), ""), ((4,), "4"), ((0, 1, 2, 5), "0-2,5"), ((3, 1), "1,3")]
)
def test_layer_ranges(layers: tuple[int, ...], text: str) -> None:
    assert layer_ranges(layers) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.7884, "788"), (0.0123, "12.3"), (0.00123, "1.23"), (4e-7, "0.0004")]
)
def test_milliseconds_keep_three_digits(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_the_number_that_tells_layers_apart_is_the_layer() -> None:
    names = [f"net.0.encoder.{layer}.expert.1.fc.fprop" for layer in (3, 4, 7)]
    one = site("contraction", "fprop", "bf16")
    sites = dict.fromkeys((*names, "net.0.pool.fprop", "head.fprop"), one)
    rows = [(row.module, row.layers) for row in contraction_rows(sites)]
    assert rows == [
        ("net.0.encoder.*.expert.1.fc", (3, 4, 7)),
        ("net.*.pool", (0,)),
        ("head", ()),
    ]


def test_plans_of_files_name_no_casts_and_only_what_there_is(plan: Plan) -> None:
    sites = {name: one for name, one in plan.sites.items() if one.role not in ("dgrad", "wgrad")}
    text = printed(replace(plan, sites=sites, measures="outputs"))
    assert "ms per run predicted" in text
    assert "73 casts" not in text
    assert "fprop" in text
    assert "dgrad" not in text
    assert "73 casts" in printed(plan)
    assert "dgrad" in printed(plan)
