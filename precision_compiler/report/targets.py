"""The known machines as a table in a terminal."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_compiler.report.show import format_text
from precision_compiler.target import Target


def show_targets(targets: Iterable[Target], console: Console) -> None:
    """Prints each target with the rates that large matrix products reach on it."""
    table = Table(title="Targets", title_justify="left", show_lines=True)
    table.add_column("name", style="bold")
    table.add_column("machine", overflow="fold")
    table.add_column("memory GB/s", justify="right")
    table.add_column("TFLOP/s reached, by format", overflow="fold")
    table.add_column("source", overflow="fold", style="dim")
    for target in targets:
        table.add_row(
            target.name,
            target.description,
            f"{target.bandwidth * target.bandwidth_fraction / 1e9:.0f}",
            _rates(target),
            target.source,
        )
    console.print(table)


def _rates(target: Target) -> Text:
    """Formats with their rates; `?` marks a rate that rests on a weak source."""
    parts = []
    for name, rate in target.formats.items():
        doubt = "?" if rate.confidence == "weak" else ""
        parts.append(format_text(name).append(f" {rate.flops / 1e12:.3g}{doubt}", style="default"))
    return Text("  ").join(parts)
