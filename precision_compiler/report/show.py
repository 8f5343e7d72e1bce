"""A plan as tables in a terminal. Reads the plan only."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from precision_compiler.flags import Flag
from precision_compiler.outcomes import Totals, Verification
from precision_compiler.plan import Plan, SiteChoice
from precision_compiler.report.places import layer_numbers
from precision_compiler.sizes import readable_bytes

ROLES = ("fprop", "dgrad", "wgrad")
STYLES = {"fp32": "dim", "tf32": "cyan", "bf16": "green", "fp16": "green"}
NARROW_STYLE = "magenta"


@dataclass(frozen=True)
class Row:
    """Layers whose sites have the same formats: one line of the table of contractions.

    Attributes:
        module: path of the module, `*` where the number of the layer was.
        layers: numbers of the layers, empty for a module that is not repeated.
        formats: format of each role, in the order of `ROLES`; None where there is no such site.
        seconds: predicted time of all its sites.
        variance_share: their share of the predicted error's variance.
    """

    module: str
    layers: tuple[int, ...]
    formats: tuple[str | None, ...]
    seconds: float
    variance_share: float


def show_plan(plan: Plan, console: Console, *, every_site: bool = False) -> None:
    """Prints a plan: totals, contractions by layer and role, storage by format.

    Args:
        plan: what to print.
        console: where to print it.
        every_site: also list each site with its reason, time and error.
    """
    console.print(plan_view(plan))
    if every_site:
        console.print(sites_table(plan.sites))


def plan_view(plan: Plan) -> RenderableType:
    """The totals and the tables of contractions, storage and flags, one under the other."""
    parts = [totals_view(plan), contractions_table(plan.sites), storage_table(plan.sites)]
    return Group(*parts, flags_table(plan.flags)) if plan.flags else Group(*parts)


def totals_view(plan: Plan) -> RenderableType:
    """What the plan promises, against what it was compared with."""
    totals = plan.totals
    grid = Table.grid(padding=(0, 2))
    grid.add_row("[bold]time", _time_line(plan))
    if totals.calibrated is not None:
        grid.add_row("[bold]calibrated", calibrated_line(plan))
    grid.add_row("[bold]error", _error_line(plan))
    if plan.verification is not None:
        grid.add_row("[bold]measured", _measured_line(plan, plan.verification))
    if totals.activation_bytes:
        grid.add_row("[bold]memory", _memory_line(totals))
    if plan.trial is not None:
        grid.add_row("[bold]trial", plan.trial.sentence)
    grid.add_row("[bold]budget", f"{plan.budget.limit:.2g}: {plan.budget.origin}")
    grid.add_row("[bold]bound", _bound_line(totals))
    grid.add_row("[bold]made for", f"target {plan.target}, graph {plan.fingerprint[:12]}")
    return grid


def _memory_line(totals: Totals) -> str:
    saved = 1 - totals.activation_bytes / totals.fp32_activation_bytes
    return (
        f"{readable_bytes(totals.activation_bytes)} kept for the backward pass, {saved:.0%} less "
        f"than fp32 (autocast {readable_bytes(totals.autocast_activation_bytes)})"
    )


def contraction_rows(sites: Mapping[str, SiteChoice]) -> list[Row]:
    """Contraction sites by module; layers with the same formats share a row."""
    modules: dict[str, dict[str, SiteChoice]] = defaultdict(dict)
    for name, choice in sites.items():
        if choice.kind == "contraction":
            module, _, role = name.rpartition(".")
            modules[module][role] = choice
    layers = _layers(modules)
    groups: dict[tuple[str, tuple[str | None, ...]], list[str]] = defaultdict(list)
    for module, choices in modules.items():
        formats = tuple(choices[role].format if role in choices else None for role in ROLES)
        groups[layers[module][0], formats].append(module)
    return [
        Row(
            module=pattern,
            layers=tuple(layer for name in names if (layer := layers[name][1]) is not None),
            formats=formats,
            seconds=sum(choice.seconds for name in names for choice in modules[name].values()),
            variance_share=sum(
                choice.variance_share for name in names for choice in modules[name].values()
            ),
        )
        for (pattern, formats), names in groups.items()
    ]


def contractions_table(sites: Mapping[str, SiteChoice]) -> Table:
    """The formats that matrix products and attention compute in."""
    table = Table(title="Contractions: format of the operands", title_justify="left")
    table.add_column("module", overflow="fold")
    table.add_column("layers", justify="right")
    rows = contraction_rows(sites)
    shown = [place for place in range(len(ROLES)) if any(row.formats[place] for row in rows)]
    for place in shown:
        table.add_column(ROLES[place])
    table.add_column("ms", justify="right")
    table.add_column("of error", justify="right")
    for row in rows:
        table.add_row(
            row.module,
            layer_ranges(row.layers),
            *(format_text(row.formats[place]) for place in shown),
            milliseconds(row.seconds),
            f"{row.variance_share:.1%}",
        )
    return table


def storage_table(sites: Mapping[str, SiteChoice]) -> Table:
    """How many tensors are kept in which format."""
    kept = [choice for choice in sites.values() if choice.kind == "storage"]
    elements = sum(math.prod(choice.shape) for choice in kept) or 1
    by_format: dict[str, list[SiteChoice]] = defaultdict(list)
    for choice in kept:
        by_format[choice.format].append(choice)
    table = Table(title="Storage: format of the tensors in memory", title_justify="left")
    table.add_column("format")
    for heading in ("tensors", "of elements", "ms", "of error"):
        table.add_column(heading, justify="right")
    for name, choices in by_format.items():
        table.add_row(
            format_text(name),
            str(len(choices)),
            f"{sum(math.prod(choice.shape) for choice in choices) / elements:.1%}",
            milliseconds(sum(choice.seconds for choice in choices)),
            f"{sum(choice.variance_share for choice in choices):.1%}",
        )
    return table


def sites_table(sites: Mapping[str, SiteChoice]) -> Table:
    """Every site with its format, the reason for it, its time and its error."""
    table = Table(title="Sites", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("format")
    table.add_column("shape", overflow="fold")
    table.add_column("ms", justify="right")
    table.add_column("of error", justify="right")
    table.add_column("reason", overflow="fold")
    for name, choice in sites.items():
        table.add_row(
            name,
            format_text(choice.format),
            "x".join(map(str, choice.shape)),
            milliseconds(choice.seconds),
            f"{choice.variance_share:.2%}",
            choice.reason,
        )
    return table


def flags_table(flags: Iterable[Flag]) -> Table:
    """Flags by name: how many, how many of them rule a format out, and the first of them."""
    by_name: dict[str, list[Flag]] = defaultdict(list)
    for flag in flags:
        by_name[flag.name].append(flag)
    table = Table(title="Flags", title_justify="left")
    table.add_column("flag")
    table.add_column("found", justify="right")
    table.add_column("vetoes", justify="right")
    table.add_column("for example", overflow="fold")
    for name, found in by_name.items():
        first = next((flag for flag in found if flag.veto), found[0])
        place = " in ".join(part for part in (first.site, first.format) if part)
        example = f"{place}: {first.sentence}" if place else first.sentence
        vetoes = sum(flag.veto for flag in found)
        table.add_row(name, str(len(found)), str(vetoes or ""), example)
    return table


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, three significant digits at the most."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def layer_ranges(layers: Sequence[int]) -> str:
    """Layer numbers as ranges: `0-3,5`."""
    ranges: list[list[int]] = []
    for layer in sorted(layers):
        if ranges and layer == ranges[-1][-1] + 1:
            ranges[-1][1:] = [layer]
        else:
            ranges.append([layer])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


def format_text(name: str | None) -> Text:
    """A format's name in its colour, empty for None."""
    if name is None:
        return Text("")
    return Text(name, style=STYLES.get(name, NARROW_STYLE))


def _layers(modules: Iterable[str]) -> dict[str, tuple[str, int | None]]:
    """Each module with `*` for the number of its layer, and that number; None where it has none."""
    numbers = layer_numbers(tuple(module.split(".")) for module in modules)
    return {
        ".".join(path): (".".join(path), None)
        if place is None
        else (".".join((*path[:place], "*", *path[place + 1 :])), int(path[place]))
        for path, place in numbers.items()
    }


def _time_line(plan: Plan) -> str:
    """Casts of an ONNX file are the file's: its plan knows neither their number nor their time."""
    totals, of_file = plan.totals, plan.measures == "outputs"
    return (
        f"{milliseconds(totals.predicted_seconds)} ms per {'run' if of_file else 'step'} predicted"
        f" (fp32 {_compared(totals.fp32_seconds, totals)},"
        f" autocast {_compared(totals.autocast_seconds, totals)}), "
        + ("without the file's casts" if of_file else f"{totals.casts} casts")
    )


def calibrated_line(plan: Plan) -> str:
    """The plan's step time by measured steps: its own one, or a prediction that they correct."""
    totals, trial = plan.totals, plan.trial
    measured = f"measured {milliseconds(trial.seconds[trial.winner])} ms" if trial else ""
    if trial is not None and trial.winner in trial.anchors:
        return f"{measured} per step: this is one of the steps that calibrate, not a prediction"
    rule, seconds = totals.calibrated, totals.calibrated_seconds
    assert rule is not None
    assert seconds is not None
    return (
        f"{milliseconds(seconds)} ms per step predicted (calibrated by the trial: {rule.rate:.2f} "
        f"of the sum of prices and {milliseconds(rule.fixed)} ms), {measured or 'not measured'}"
    )


def _compared(seconds: float, totals: Totals) -> str:
    return f"{milliseconds(seconds)} ms = {seconds / totals.predicted_seconds:.2f}x"


def _error_line(plan: Plan) -> str:
    totals = plan.totals
    return (
        f"{totals.predicted_gradient_error:.2g} predicted, {plan.budget.limit:.2g} allowed"
        f" by budget {plan.budget.asked} (autocast {totals.autocast_gradient_error:.2g})"
    )


def _measured_line(plan: Plan, verification: Verification) -> str:
    found = verification.measured
    batch = "a held-out batch" if verification.held_out else "the calibration batch"
    verdict = "" if verification.passed else " [bold red]outside of what was promised[/]"
    if plan.measures == "outputs":
        return (
            f"{found.gradient_error:.2g} on {batch}, {found.tensor_error:.2g} per output{verdict}"
        )
    return (
        f"{found.gradient_error:.2g} on {batch}, {found.tensor_error:.2g} per tensor,"
        f" loss {found.loss_error:+.1g} (sigma {found.predicted_loss_sigma:.1g} predicted){verdict}"
    )


def _bound_line(totals: Totals) -> str:
    return (
        f"no plan within the budget takes less than {milliseconds(totals.bound_seconds)} ms:"
        f" gap {totals.gap:.1%}"
    )
