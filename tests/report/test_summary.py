"""A plan in numbers: what programs read, tables by layer, operation and role, notebooks."""

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from precision_compiler.report.places import By
from precision_compiler.report.summary import groups_table, summary
from tests.models import planned


def test_summary_is_json_with_totals_and_groups() -> None:
    plan = planned("gpt")
    record = json.loads(json.dumps(summary(plan)))
    assert record["totals"]["predicted_seconds"] == plan.predicted_seconds
    assert record["digest"] == plan.digest
    assert sum(record["formats"].values()) == len(plan.sites)
    assert {group["name"] for group in record["by"]["layer"]} >= {"blocks.0", "blocks.1"}
    assert sum(found["vetoes"] for found in record["flags"].values()) == sum(
        flag.veto for flag in plan.flags
    )


@pytest.mark.parametrize(
    ("by", "word"), [("layer", "blocks.1"), ("op", "addmm"), ("role", "wgrad")]
)
def test_table_by(by: By, word: str) -> None:
    stream = io.StringIO()
    Console(file=stream, width=160).print(groups_table(planned("gpt"), by))
    text = stream.getvalue()
    assert f"Sites by {by}" in text
    assert word in text
    assert "of error" in text


def test_notebook_table_is_compact_and_escaped() -> None:
    plan = replace(planned("gpt"), target="<b>&")
    text = plan._repr_html_()
    assert text.startswith("<table>")
    assert text.count("<table>") == 1
    assert "&lt;b&gt;&amp;" in text
    assert "wgrad" in text
    assert len(text) < 3000
