"""Two plans side by side: sites, totals, other graphs."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from precision_compiler.plan import Plan
from precision_compiler.report.diff import Side, SiteChange, TotalChange, compare, show_difference
from tests.made_plans import big_plan


@pytest.fixture(scope="module")
def plan() -> Plan:
    return big_plan(sites=12, nodes=0)


def printed(before: Plan, after: Plan) -> str:
    stream = io.StringIO()
    show_difference(compare(before, after), Console(file=stream, width=160))
    return stream.getvalue()


def changed(plan: Plan, name: str, to: str) -> Plan:
    choice = replace(plan.sites[name], format=to, seconds=0.5, error=0.25)
    return replace(plan, sites={**plan.sites, name: choice})


def test_plan_equals_itself_whenever_it_was_made(plan: Plan) -> None:
    assert compare(plan, replace(plan, journal=(), versions={"torch": "3"})).equal
    assert printed(plan, plan).strip() == "the plans are equal"


def test_site_shows_format_time_and_error_of_both(plan: Plan) -> None:
    name = "blocks.0.attn.qkv.fprop"
    old = plan.sites[name]
    after = changed(plan, name, "e4m3")
    difference = compare(plan, after)
    assert not difference.equal
    assert difference.sites == (
        SiteChange(name, Side("fp32", old.seconds, old.error), Side("e4m3", 0.5, 0.25)),
    )
    text = printed(plan, after)
    for part in ("fp32 -> e4m3", "0.01 -> 500", "1e-05 -> 0.25", "another format: 1"):
        assert part in text, part


def test_totals_show_both_and_the_change(plan: Plan) -> None:
    after = replace(plan, target="b200", totals=replace(plan.totals, predicted_seconds=0.15))
    assert compare(plan, after).totals == (
        TotalChange("target", "h100", "b200"),
        TotalChange("predicted_seconds", 0.3, 0.15),
    )
    text = printed(plan, after)
    assert "-50.0%" in text
    assert "b200" in text


def test_other_graph_is_said_first_and_sites_are_listed(plan: Plan) -> None:
    sites = dict(plan.sites)
    gone = sites.pop("blocks.0.attn.qkv.fprop")
    other = replace(plan, fingerprint="f", sites={**sites, "head[bold].fprop": gone})
    text = printed(plan, other)
    assert text.startswith("the plans are of different graphs")
    assert "fp32 -> none" in text
    assert "none -> fp32" in text
    assert "head[bold].fprop" in text
    assert not compare(plan, replace(plan, fingerprint="f")).equal


def test_difference_is_json(plan: Plan) -> None:
    after = changed(plan, "blocks.0.attn.qkv.fprop", "e4m3")
    record = json.loads(json.dumps(compare(plan, after).to_dict()))
    assert (record["equal"], record["same_graph"]) == (False, True)
    assert record["sites"][0]["after"] == {"format": "e4m3", "seconds": 0.5, "error": 0.25}
