"""A plan as one HTML file: no network, no other file, nothing in it but the plan.

What has few rows is written by the template; sites are drawn in the browser from the plan's own
JSON. Names in a plan are untrusted: Jinja escapes them, the scripts set text and never markup, and
a content security policy allows no request and no script but the ones written here.
"""

import base64
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import log2
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from precision_compiler.files import write_record
from precision_compiler.flags import FLAGS, Flag
from precision_compiler.formats import CHOICES
from precision_compiler.frontier import Frontier
from precision_compiler.plan import Plan
from precision_compiler.report.curve import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, curve_of
from precision_compiler.report.headline import candidates, facts, particulars
from precision_compiler.report.places import COLUMNS, sections_of

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("dom.js", "ranges.js", "explain.js", "grid.js", "scatter.js", "main.js")
STYLES = ("page.css", "sites.css")
SHAPES = {
    "plan": "M 0 -8 L 2 -3 L 8 -3 L 3 1 L 5 7 L 0 3 L -5 7 L -3 1 L -8 -3 L -2 -3 Z",
    "fp32": "M -5 -5 H 5 V 5 H -5 Z",
    "autocast": "M 0 -6 L 6 5 H -6 Z",
}
"""SVG paths around the origin."""


@dataclass(frozen=True)
class FlagGroup:
    """Flags of one name.

    Attributes:
        name: the name.
        meaning: what it stands for.
        found: how many there are.
        vetoes: how many of them rule a format out.
        example: the first of them, one that vetoes if there is one.
    """

    name: str
    meaning: str
    found: int
    vetoes: int
    example: Flag


def write_report(
    plan: Plan, path: Path, title: str = "plan", frontier: Frontier | None = None
) -> None:
    """Writes a plan as a page, whole or not at all.

    Raises:
        PlanError: the file cannot be written.
    """
    write_record(path, report_html(plan, title, frontier), "report")


def report_html(plan: Plan, title: str = "plan", frontier: Frontier | None = None) -> str:
    """The page as text.

    Args:
        plan: what it is about.
        title: what to call the plan, such as the name of its file.
        frontier: the fastest plans for other errors; without it they are not drawn.
    """
    record = json.loads(plan.to_json())
    record.pop("tables")  # what solving again needs, and a page does not
    script = f'"use strict";\n(() => {{\n{_joined(SCRIPTS)}}})();\n'
    style = _joined(STYLES)
    return _environment().get_template("report.html.jinja").render(
        title=title,
        plan=plan,
        policy=_policy(script, style),
        script=Markup(script),
        style=Markup(style),
        plan_json=embedded(record),
        view_json=embedded(_view(plan)),
        candidates=candidates(plan),
        facts=facts(plan),
        particulars=particulars(plan),
        flags=flag_groups(plan),
        columns=COLUMNS,
        curve=None if frontier is None else curve_of(frontier),
        size=(WIDTH, HEIGHT),
        edges=(TOP, HEIGHT - BOTTOM, LEFT, WIDTH - RIGHT),
        shapes=SHAPES,
        sum_of_steps=sum(entry.seconds for entry in plan.journal),
    )  # fmt: skip


def flag_groups(plan: Plan) -> list[FlagGroup]:
    """Flags by name: those that rule formats out first, then the most frequent first."""
    by_name: dict[str, list[Flag]] = defaultdict(list)
    for flag in plan.flags:
        by_name[flag.name].append(flag)
    groups = [
        FlagGroup(
            name=name,
            meaning=FLAGS.get(name, ""),
            found=len(found),
            vetoes=sum(flag.veto for flag in found),
            example=next((flag for flag in found if flag.veto), found[0]),
        )
        for name, found in by_name.items()
    ]
    return sorted(groups, key=lambda group: (group.vetoes == 0, -group.found))


def embedded(record: Any) -> Markup:
    """JSON that can stand in a script element: no character in it can end the element."""
    text = json.dumps(record, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _view(plan: Plan) -> Mapping[str, Any]:
    """What the scripts need beside the plan: the rows of the grid, formats by width."""
    names = {choice.format for choice in plan.sites.values()}
    known = sorted(names, key=lambda name: (-CHOICES[name].bits, -CHOICES[name].precision))
    return {
        "names": list(plan.sites),  # a JavaScript object has its own idea of the order of keys
        "sections": [
            {"name": section.name, "rows": list(section.rows.items())}
            for section in sections_of(plan.sites)
        ],
        "columns": COLUMNS,
        "formats": {name: CHOICES[name].bits for name in known},
        "limits": {
            name: None  # every block has a scale of its own
            if fmt.by_axis
            else [log2(fmt.smallest_subnormal), log2(fmt.max_finite), fmt.scaled]
            for name, fmt in CHOICES.items()
        },
    }


def _policy(script: str, style: str) -> str:
    hashes = {"script-src": script, "style-src": style}
    allowed = (f"{kind} 'sha256-{_digest(text)}'" for kind, text in hashes.items())
    return "; ".join(["default-src 'none'", "img-src data:", "base-uri 'none'", *allowed])


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _joined(names: tuple[str, ...]) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in names)


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
