"""What several subcommands share."""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from precision_compiler.errors import PrecisionError
from precision_compiler.overrides import read_overrides

WORKLOAD = "file.py:function or package.module:function; it returns a Workload(model, batches)"
"""Help of the argument that names a workload."""


def require_folder(path: Path) -> None:
    """Raises an error where a file could not be written, before any work is done for it."""
    if not path.parent.is_dir():
        raise PrecisionError(f"there is no folder {path.parent} to write {path.name} in: create it")


def budget_of(text: str) -> str | float:
    """A budget as the command line has it: a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


@contextmanager
def spinner(first: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on and for how long; yields the function that says what is next."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(first)
        yield lambda sentence: progress.update(task, description=sentence)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """The arguments that insist on formats."""
    parser.add_argument(
        "--override", action="append", default=[], metavar="GLOB=FORMAT",
        help="a format to insist on, such as 'blocks.*.fc.wgrad=bf16'; may be given often",
    )  # fmt: skip
    parser.add_argument(
        "--overrides", type=Path, metavar="FILE",
        help="a TOML file of them, lines such as \"blocks.*.fc.wgrad\" = \"bf16\"",
    )  # fmt: skip


def overrides_of(options: argparse.Namespace) -> dict[str, str]:
    """Format by glob, from a file and from arguments, which count where both are about a glob."""
    found = {} if options.overrides is None else read_overrides(options.overrides)
    for text in options.override:
        pattern, equals, fmt = text.rpartition("=")
        if not equals or not pattern:
            raise PrecisionError(f"--override {text}: write GLOB=FORMAT, such as 'head.*=fp32'")
        found[pattern.strip()] = fmt.strip()
    return found
