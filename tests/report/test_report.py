"""A plan as a page: one file, all of the plan in it, and names that stay text."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from precision_compiler.errors import PlanError
from precision_compiler.flags import Flag
from precision_compiler.outcomes import MeasuredError, Trial, Verification
from precision_compiler.plan import Plan
from precision_compiler.report.html import TEMPLATES, report_html, write_report
from tests.made_plans import HOSTILE, big_plan, with_names
from tests.models import planned
from tests.random_plans import plans


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: dict[str | None, str] = {}
        self.words: list[str] = []
        self._open: str | None = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        self._open = dict(attrs).get("id") if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open == "":
            self.words.append(data)
        else:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data

    def data(self, name: str) -> object:
        return json.loads(self.scripts[name])

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def plan() -> Plan:
    return planned("gpt")


@pytest.fixture(scope="module")
def page(plan: Plan) -> Page:
    return Page(report_html(plan, "plan.json"))


def test_page_asks_for_nothing(page: Page, plan: Plan) -> None:
    loading = ("src", "srcset", "action", "data", "poster", "style", "onclick", "onload")
    assert not [name for name, _ in page.attributes if name in loading]
    links = {value for name, value in page.attributes if name == "href"}
    assert links == {"data:,", "#sites"}
    assert not {"iframe", "img", "object", "embed", "base"} & set(page.tags)
    policy = next(str(value) for _, value in page.attributes if value and "-src" in value)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    text = report_html(replace(plan, journal=(), flags=()))
    found = set(re.findall(r"https?://[^\"'\s]*", text))
    assert found <= {"http://www.w3.org/2000/svg"}  # a name, not an address


def test_templates_load_nothing_and_set_no_markup() -> None:
    for path in TEMPLATES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert text.isascii(), path.name
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval(", "@import", "url(",
                     "fetch(", "XMLHttp", "WebSocket", "document.write", "| safe"):  # fmt: skip
            assert word not in text, (path.name, word)


def shown(plan: Plan) -> Any:
    """A plan without what solving again needs."""
    record = json.loads(plan.to_json())
    del record["tables"]
    return record


def test_embedded_data_is_the_plan(page: Page, plan: Plan) -> None:
    assert page.data("plan-data") == shown(plan)


def test_every_site_has_one_cell(page: Page, plan: Plan) -> None:
    view = page.data("view-data")
    assert isinstance(view, dict)
    assert view["names"] == list(plan.sites)
    cells = [
        position
        for section in view["sections"]
        for _, row in section["rows"]
        for column, positions in row.items()
        for position in positions
        if column in view["columns"]
    ]
    assert sorted(cells) == list(range(len(plan.sites)))
    assert set(view["formats"]) == {choice.format for choice in plan.sites.values()}


def test_hostile_names_are_text(plan: Plan, page: Page) -> None:
    hostile = with_names(plan, HOSTILE)
    read = Page(report_html(hostile, HOSTILE))
    assert read.data("plan-data") == shown(hostile)
    assert "img" not in read.tags
    assert read.tags.count("script") == page.tags.count("script")
    assert "onerror" not in {name for name, _ in read.attributes}


@given(plans)
def test_any_plan_is_embedded_whole(plan: Plan) -> None:
    assert Page(report_html(plan)).data("plan-data") == shown(plan)


def test_totals_come_first_then_flags_sites_and_journal(page: Page) -> None:
    headings = ("Totals", "Flags", "Sites", "Share of error", "Journal")
    places = [page.text.index(heading) for heading in headings]
    assert places == sorted(places)


def test_headline_says_what_was_promised_and_kept(plan: Plan) -> None:
    found = MeasuredError(0.0123, 0.008, 0.034, {}, (), 2.5, -3e-4, 1e-4)
    text = Page(
        report_html(
            replace(
                plan,
                verification=Verification(found, True, 2, {}, False),
                trial=Trial({"plan": 0.5, "fp32": 0.7}, "plan", "the plan is kept"),
            )
        )
    ).text
    for part in (
        "FAILED: gradient error 0.012 measured on a held-out batch, 0.008 predicted (ratio 1.54)",
        "the plan is kept",
        "ms in trial",
        "bound by autocast",
        "no plan within the budget takes less than",
        "autocast bf16",
    ):
        assert part in text, part
    assert "step time" not in Page(report_html(plan)).text
    assert "was not checked" in Page(report_html(replace(plan, verification=None))).text


def test_memory_is_told_in_units_people_read(plan: Plan) -> None:
    totals = replace(plan.totals, activation_bytes=7.5e9, fp32_activation_bytes=512.0)
    text = " ".join(Page(report_html(replace(plan, totals=totals))).text.split())
    assert "activation bytes 7.5 GB" in text
    assert "fp32 activation bytes 512 bytes" in text


def test_vetoing_flags_come_first_with_counts(plan: Plan) -> None:
    flags = (
        *(Flag("coherent", "a.fprop", "bf16", "they add up", {}, False) for _ in range(3)),
        Flag("flush", "b.store", "fp16", "some is gone", {}, False),
        Flag("flush", "c.store", "fp16", "all is gone", {}, True),
    )
    text = Page(report_html(replace(plan, flags=flags))).text
    assert text.index("2 found, 1 veto ") < text.index("3 found")
    assert "for example c.store in fp16: all is gone" in text
    assert "No flag was raised" in Page(report_html(replace(plan, flags=()))).text


def test_large_plan_stays_a_small_page() -> None:
    plan = big_plan(sites=4000, nodes=10_000)
    text = report_html(plan)
    outside = len(text) - len(json.dumps(shown(plan), separators=(",", ":")))
    assert outside < 500_000
    assert len(Page(text).tags) < 300


def test_page_that_cannot_be_written_is_a_mistake_of_the_user(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot write the report"):
        write_report(plan, tmp_path / "none" / "report.html")
