"""What several subcommands share."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from precision_compiler.errors import PrecisionError

WORKLOAD = "file.py:function or package.module:function; it returns a Workload(model, batches)"
"""Help of the argument that names a workload."""


def require_folder(path: Path) -> None:
    """Raises an error where a file could not be written, before any work is done for it."""
    if not path.parent.is_dir():
        raise PrecisionError(f"there is no folder {path.parent} to write {path.name} in: create it")


@contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on and for how long; yields the function that says what is next."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(first)
        yield lambda sentence: progress.update(task, description=sentence)
