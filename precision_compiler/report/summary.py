"""A plan in numbers that a program can read, and as a table by layer, operation or role."""

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from precision_compiler.outcomes import Verification
from precision_compiler.plan import Plan
from precision_compiler.report.places import GROUPINGS, By, SiteGroup, groups_of
from precision_compiler.report.show import format_text, milliseconds


def summary(plan: Plan) -> dict[str, Any]:
    """What `show --json` prints: everything but the single sites, nodes and tensors."""
    return {
        "schema_version": plan.schema_version,
        "target": plan.target,
        "fingerprint": plan.fingerprint,
        "digest": plan.digest,
        "loss_origin": plan.loss_origin,
        "versions": dict(plan.versions),
        "budget": asdict(plan.budget),
        "totals": {**asdict(plan.totals), "calibrated_seconds": plan.totals.calibrated_seconds},
        "verification": _checked(plan.verification),
        "trial": asdict(plan.trial) if plan.trial else None,
        "formats": dict(Counter(choice.format for choice in plan.sites.values()).most_common()),
        "flags": _flag_counts(plan),
        "by": {by: [asdict(group) for group in groups_of(plan.sites, by)] for by in GROUPINGS},
    }


def groups_table(plan: Plan, by: By) -> Table:
    """Formats, time and error of the sites by layer, operation or role."""
    table = Table(title=f"Sites by {by}", title_justify="left")
    table.add_column(by, overflow="fold")
    table.add_column("sites", justify="right")
    table.add_column("formats", overflow="fold")
    for heading in ("ms", "of time", "of error", "vetoes"):
        table.add_column(heading, justify="right")
    groups = groups_of(plan.sites, by)
    whole = sum(group.seconds for group in groups)
    for group in groups:
        table.add_row(
            Text(group.name),
            str(group.sites),
            _formats(group),
            milliseconds(group.seconds),
            f"{group.seconds / whole if whole else 0:.1%}",
            f"{group.variance_share:.1%}",
            str(group.vetoes or ""),
        )
    return table


def _checked(verification: Verification | None) -> dict[str, Any] | None:
    if verification is None:
        return None
    record = asdict(verification)
    del record["measured"]["tensors"]
    return {**record, "ratio": verification.measured.ratio}


def _formats(group: SiteGroup) -> Text:
    counted = (format_text(name).append(f" {n}", "default") for name, n in group.formats.items())
    return Text("  ").join(counted)


def _flag_counts(plan: Plan) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for flag in plan.flags:
        found = counts.setdefault(flag.name, {"found": 0, "vetoes": 0})
        found["found"] += 1
        found["vetoes"] += flag.veto
    return counts
