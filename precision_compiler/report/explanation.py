"""An explanation as a table in a terminal. Reads the explanation only."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_compiler.explain import Alternative, Explanation


def show_explanation(found: Explanation, console: Console) -> None:
    """Prints why a site has its format, and what each other would cost.

    Args:
        found: what to print.
        console: where to print it.
    """
    console.print(Text(f"{found.site}: {found.format} ({found.binding})", style="bold"))
    console.print(Text(found.sentence))
    table = Table("format", title="Each format forced, all else decided anew", title_justify="left")
    rule = found.calibrated
    for heading in ("step, ms", "more", "error", *(["calibrated, ms"] if rule else [])):
        table.add_column(heading, justify="right")
    table.add_column("other sites that change", overflow="fold")
    for one in found.alternatives:
        *numbers, words = _cells(one, found.format)
        if rule is not None:
            numbers.append("-" if one.seconds is None else f"{1e3 * rule.seconds(one.seconds):.4g}")
        table.add_row(*map(Text, (*numbers, words)))
    console.print(table)


def _cells(one: Alternative, chosen: str) -> tuple[str, ...]:
    mark = " (chosen)" if one.format == chosen else ""
    ruled_out = f"ruled out: {one.veto}" if one.veto else ""
    if one.seconds is None or one.seconds_more is None or one.error is None:
        return f"{one.format}{mark}", "-", "-", "-", ruled_out or "nothing fits the budget then"
    shown = ", ".join(one.changed[:3])
    rest = f" and {len(one.changed) - 3} more" if len(one.changed) > 3 else ""
    words = [word for word in (ruled_out, shown + rest) if word]
    return (
        f"{one.format}{mark}",
        f"{1e3 * one.seconds:.4g}",
        f"{1e6 * one.seconds_more:+.3g} us",
        f"{one.error:.3g}",
        "; ".join(words),
    )
