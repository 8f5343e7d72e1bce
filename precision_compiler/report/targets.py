"""The known machines as tables in a terminal."""

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_compiler.report.show import format_text
from precision_compiler.target import FormatRate, Target

_WEAK = "?"
LEGEND = f"{_WEAK} rests on memory or on one secondary page"


def show_targets(targets: Iterable[Target], console: Console) -> None:
    """Prints each target with its memory and the dense peak of each format."""
    table = Table(title="Targets", title_justify="left", show_lines=True, caption=LEGEND)
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("machine", overflow="fold")
    table.add_column("memory GB", justify="right")
    table.add_column("bandwidth GB/s", justify="right")
    table.add_column("peak TFLOP/s by format", overflow="fold")
    for target in targets:
        table.add_row(
            target.name + _doubt(target.confidence),
            target.description,
            f"{target.memory / 1e9:.0f}" if target.memory else "",
            f"{target.bandwidth / 1e9:.0f}",
            _rates(target),
        )
    console.print(table)


def explain_target(target: Target, console: Console) -> None:
    """Prints everything a target's file says: numbers, rules of each format, and sources."""
    console.print(Text(f"{target.name}: {target.description}", style="bold"))
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in _facts(target).items():
        facts.add_row(name, value)
    console.print(facts)
    console.print(_format_table(target))
    sources = Table(title="Sources", title_justify="left", show_lines=True)
    sources.add_column("of", no_wrap=True)
    sources.add_column("source", overflow="fold")
    sources.add_column("note", overflow="fold")
    sources.add_row("machine", target.source, "")
    for name, row in _rows(target).items():
        sources.add_row(format_text(name), row.source, row.note)
    console.print(sources)


def _facts(target: Target) -> Mapping[str, str]:
    """The machine's own numbers, with units."""
    return {
        "device": f"{target.device} {target.compute_capability}".strip(),
        "confidence": target.confidence,
        "memory": f"{target.memory / 1e9:.0f} GB" if target.memory else "unknown",
        "bandwidth": f"{target.bandwidth / 1e9:.0f} GB/s, of which kernels reach "
        f"{target.bandwidth_fraction:.0%}, quantising ones {target.cast_fraction:.0%}",
        "last-level cache": f"{target.cache / 1e6:.0f} MB" if target.cache else "unknown",
        "units": str(target.units) if target.units else "not modelled",
        "kernel": f"{target.launch_seconds * 1e6:.1f} us launch, {target.ramp_seconds * 1e6:.1f} "
        f"us ramp; {target.issue_seconds * 1e6:.1f} us each when quantising",
        "recipes": ", ".join(target.recipes) or "none",
        "power limit": f"long products at {target.sustained_fraction:.0%} of the rate of short",
    }


def _format_table(target: Target) -> Table:
    table = Table(title="Formats", title_justify="left", caption=LEGEND)
    for header in ("format", "peak TFLOP/s", "reached", "layouts", "multiples m, n, k", "scales"):
        table.add_column(header, justify="left" if header in ("format", "layouts") else "right")
    for name, row in _rows(target).items():
        table.add_row(
            format_text(name).append(_doubt(row.confidence), style="default"),
            f"{row.peak_flops / 1e12:.5g}",
            f"{row.achieved_fraction:.1%}",
            row.layouts,
            f"{row.multiple_m}, {row.multiple_n}, {row.multiple_k}",
            _scales(row),
        )
    return table


def _scales(row: FormatRate) -> str:
    if not row.block:
        return ""
    return f"1 per {row.block} along k" + (", 1 per tensor" if row.tensor_scale else "")


def _rows(target: Target) -> Mapping[str, FormatRate]:
    return {**target.formats, **target.gemm_formats}


def _doubt(confidence: str) -> str:
    return _WEAK if confidence == "weak" else ""


def _rates(target: Target) -> Text:
    """Formats with their dense peak; `?` marks one that rests on a weak source."""
    parts = []
    for name, row in _rows(target).items():
        peak = f" {row.peak_flops / 1e12:.5g}{_doubt(row.confidence)}"
        parts.append(format_text(name).append(peak, style="default"))
    return Text("  ").join(parts)
