"""A frontier as a table in a terminal and as a figure. Reads the frontier only."""

import io
import os
from collections.abc import Mapping

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from precision_compiler.files import write_record
from precision_compiler.formats import CHOICES
from precision_compiler.frontier import Frontier, FrontierPoint
from precision_compiler.report.show import milliseconds


def show_frontier(frontier: Frontier, console: Console) -> None:
    """Prints a frontier as a table, with what it is compared with.

    Args:
        frontier: what to print.
        console: where to print it.
    """
    console.print(frontier_table(frontier))
    console.print(
        f"budget {frontier.budget.asked}: {frontier.budget.limit:.2g}, {frontier.budget.origin}; "
        f"target {frontier.target}; times and errors are predictions",
        soft_wrap=True,
    )


def frontier_table(frontier: Frontier) -> Table:
    """One row per point, then float32, autocast and the plan for the budget."""
    table = Table(title="Fastest plan for each error", title_justify="left")
    table.add_column("")
    for heading in ("error", "ms", "of fp32", "of autocast", "gap"):
        table.add_column(heading, justify="right")
    table.add_column("contractions", overflow="fold")
    table.add_column("storage", overflow="fold")
    for point in frontier.points:
        table.add_row(*_cells("", point, frontier, f"{point.gap:.2%}"))
    table.add_section()
    table.add_row(*_cells("fp32", frontier.fp32, frontier, ""))
    table.add_row(*_cells("autocast", frontier.autocast, frontier, ""))
    table.add_row(*_cells("plan", frontier.chosen, frontier, f"{frontier.chosen.gap:.2%}"))
    return table


def _cells(name: str, point: FrontierPoint, frontier: Frontier, gap: str) -> tuple[str, ...]:
    speedups = [
        f"{other.seconds / point.seconds:.2f}x" if point.seconds else "-"
        for other in (frontier.fp32, frontier.autocast)
    ]
    counts = (_counted(point.contractions), _counted(point.stores))
    return name, f"{point.error:.2g}", milliseconds(point.seconds), *speedups, gap, *counts


def _counted(formats: Mapping[str, int]) -> str:
    return " ".join(f"{name}:{formats[name]}" for name in CHOICES if formats.get(name))


def draw_frontier(frontier: Frontier, path: str | os.PathLike[str]) -> None:
    """Draws time over error as PNG; the file is written whole or not at all.

    Raises:
        PlanError: the file cannot be written.
    """
    figure = Figure(figsize=(7, 4.5), layout="tight")
    axes = figure.subplots()
    errors = [point.error for point in frontier.points]
    times = [point.seconds * 1e3 for point in frontier.points]
    axes.step(errors, times, "-", where="post", marker="o", ms=3, label="fastest plans")
    for name, point, marker in (
        ("fp32", frontier.fp32, "s"),
        ("autocast", frontier.autocast, "^"),
        (f"plan, budget {frontier.budget.asked}", frontier.chosen, "*"),
    ):
        axes.plot(point.error, point.seconds * 1e3, marker, ms=9, label=name)
    least = min((error for error in errors if error > 0), default=1e-6)
    axes.set_xscale("symlog", linthresh=least)  # float32 is at zero
    axes.set_xlim(left=0)
    axes.set_yscale("log")
    axes.set(xlabel="predicted relative gradient error", ylabel="predicted ms per step")
    axes.set_title(f"target {frontier.target}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_record(path, image.getvalue(), "figure")
