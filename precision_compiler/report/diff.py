"""What two plans decide differently: site by site, and in their totals. Reads the plans only."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_compiler.plan import Plan, SiteChoice
from precision_compiler.report.show import format_text, milliseconds

Value = str | float | None


@dataclass(frozen=True)
class Side:
    """What one of the plans says of a site."""

    format: str
    seconds: float
    error: float


@dataclass(frozen=True)
class SiteChange:
    """A site whose format differs; None: the plan has no such site."""

    site: str
    before: Side | None
    after: Side | None


@dataclass(frozen=True)
class TotalChange:
    """A number of the whole plan that differs; None: it is not known."""

    name: str
    before: Value
    after: Value


@dataclass(frozen=True)
class Difference:
    """Everything that two plans decide or promise differently.

    Attributes:
        same_graph: whether both were made for the same graph.
        sites: sites with another format.
        totals: target, budget and totals that differ.
    """

    same_graph: bool
    sites: tuple[SiteChange, ...]
    totals: tuple[TotalChange, ...]

    @property
    def equal(self) -> bool:
        """Whether there is no difference at all."""
        return self.same_graph and not self.sites and not self.totals

    def to_dict(self) -> dict[str, Any]:
        """What `diff --json` prints."""
        return {"equal": self.equal, **asdict(self)}


def compare(before: Plan, after: Plan) -> Difference:
    """The differences of two plans; journals and versions are not compared."""
    sites = (
        SiteChange(
            change.site, _side(before.sites.get(change.site)), _side(after.sites.get(change.site))
        )
        for change in before.diff(after)
    )
    old, new = _whole(before), _whole(after)
    names = [*old, *(name for name in new if name not in old)]
    pairs = (TotalChange(name, old.get(name), new.get(name)) for name in names)
    return Difference(
        same_graph=before.fingerprint == after.fingerprint,
        sites=tuple(sites),
        totals=tuple(pair for pair in pairs if pair.before != pair.after),
    )


def show_difference(difference: Difference, console: Console) -> None:
    """Prints what differs; first of all, whether the plans are of different graphs."""
    if difference.equal:
        console.print("the plans are equal")
        return
    if not difference.same_graph:
        console.print("[bold]the plans are of different graphs[/]: sites are compared by name")
    if difference.totals:
        console.print(_totals_table(difference.totals))
    if difference.sites:
        console.print(_sites_table(difference.sites))
    console.print(f"sites with another format: {len(difference.sites)}")


def _side(choice: SiteChoice | None) -> Side | None:
    return None if choice is None else Side(choice.format, choice.seconds, choice.error)


def _whole(plan: Plan) -> Mapping[str, Value]:
    """The numbers of the whole plan, whichever there are."""
    return {
        "target": plan.target,
        "budget": plan.budget.asked,
        "budget limit": plan.budget.limit,
        **{name: _plain(value) for name, value in asdict(plan.totals).items()},
    }


def _plain(value: Any) -> Value:
    return value if value is None or isinstance(value, str | int | float) else repr(value)


def _totals_table(changes: Iterable[TotalChange]) -> Table:
    table = Table(title="Totals", title_justify="left")
    table.add_column("total")
    for heading in ("before", "after", "change"):
        table.add_column(heading, justify="right")
    for change in changes:
        shown = (_value(change.name, value) for value in (change.before, change.after))
        name = change.name.removeprefix("predicted_").replace("_seconds", " ms").replace("_", " ")
        table.add_row("time ms" if name == "seconds" else name, *shown, _relative(change))
    return table


def _value(name: str, value: Value) -> str:
    if not isinstance(value, int | float):
        return "" if value is None else value
    return milliseconds(value) if name.endswith("seconds") else f"{value:.4g}"


def _relative(change: TotalChange) -> str:
    old, new = change.before, change.after
    if isinstance(old, int | float) and isinstance(new, int | float) and old:
        return f"{new / old - 1:+.1%}"
    return ""


def _sites_table(changes: Iterable[SiteChange]) -> Table:
    table = Table(title="Sites", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("format")
    table.add_column("ms", justify="right")
    table.add_column("error", justify="right")
    for change in changes:
        sides = (change.before, change.after)
        formats = (format_text(side.format) if side else Text("none", "dim") for side in sides)
        table.add_row(
            Text(change.site),
            Text(" -> ").join(formats),
            " -> ".join(milliseconds(side.seconds) if side else "" for side in sides),
            " -> ".join(f"{side.error:.2g}" if side else "" for side in sides),
        )
    return table
