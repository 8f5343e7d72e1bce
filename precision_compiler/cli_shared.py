"""What several subcommands need: budgets from text, and a sign of life."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def budget_of(text: str) -> str | float:
    """A budget as the command line has it: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None]]:
    """Show what is going on and for how long; yields the function that says what is next."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(first)
        yield lambda sentence: progress.update(task, description=sentence)
