"""The subcommands about GPU code: what `lower` and `selftest` take, and what they do."""

import argparse
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from precision_compiler.cli_common import WORKLOAD, require_folder, spinner
from precision_compiler.cli_plans import PLAN, load_plan
from precision_compiler.compiler import lower
from precision_compiler.files import write_atomically
from precision_compiler.kernels.selftest import selftest
from precision_compiler.lowering.products import Lowered
from precision_compiler.workload import load_workload


def add_lower(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that shows what a plan becomes on a GPU."""
    parser = commands.add_parser(
        "lower",
        help="show the operations that a plan becomes on a GPU; needs none",
        description="Rewrites the training graph as a plan has it, on GPU tensors without "
        "contents, and lists by what operation the products of each format are computed, and "
        "what is left to emulation, with the reason.",
        epilog="example: precision-compiler lower train.py:workload plan.json -o graph.txt",
    )
    parser.add_argument("workload", metavar="WORKLOAD", help=WORKLOAD)
    parser.add_argument("plan", type=Path, metavar="PLAN", help=PLAN)
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="also write the whole graph as text"
    )
    parser.set_defaults(command=_lower)


def add_selftest(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that runs the kernels."""
    parser = commands.add_parser(
        "selftest",
        help="check the GPU kernels on this machine against their references",
        description="Runs every kernel against its reference and times it. On the CPU, where "
        "kernels are their references, it runs torch's checks of operators. Exits with 1 if a "
        "kernel is wrong, with 2 if there is no such device.",
        epilog="example: precision-compiler selftest --device cuda",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda",
        help="where to run; cuda is AMD's too (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(command=_selftest)


def _lower(options: argparse.Namespace) -> None:
    workload = load_workload(options.workload)
    plan = load_plan(options.plan)
    if options.output is not None:
        require_folder(options.output)
    with spinner("lowering"):
        lowered = lower(workload.model, workload.first_batch(), plan, loss=workload.loss)
    console = Console()
    console.print(_products_table(lowered))
    for note in lowered.notes:
        console.print(note)
    if options.output is not None:
        code = lowered.module.print_readable(
            print_output=False, include_stride=True, include_device=True
        )
        write_atomically(options.output, code)
        console.print(f"wrote {options.output}", soft_wrap=True)


def _products_table(lowered: Lowered) -> Table:
    table = Table(title="products and attention on the GPU")
    table.add_column("format")
    table.add_column("operation")
    table.add_column("how many", justify="right")
    counts = Counter((product.format, product.operation) for product in lowered.products)
    for (fmt, operation), count in sorted(counts.items()):
        table.add_row(fmt, operation, str(count))
    return table


def _selftest(options: argparse.Namespace) -> int:
    wrong = 0
    for check in selftest(options.device):
        wrong += bool(check.problems)
        words = check.skipped or "; ".join(check.problems) or "as its reference"
        time = "" if check.milliseconds is None else f", {check.milliseconds:.3f} ms"
        print(f"{check.kernel} {check.format}: {words}{time}", flush=True)
    return int(wrong > 0)
