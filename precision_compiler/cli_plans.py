"""The subcommands that read plans: what `show`, `report` and `diff` take, and what they do."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from precision_compiler.cli_common import add_overrides, overrides_of, require_folder, spinner
from precision_compiler.compiler import measure_error
from precision_compiler.errors import PrecisionError
from precision_compiler.export import read_plan
from precision_compiler.plan import Plan
from precision_compiler.record import frontier_of_plan
from precision_compiler.report.diff import compare, show_difference
from precision_compiler.report.html import write_report
from precision_compiler.report.places import GROUPINGS
from precision_compiler.report.show import flags_table, show_plan, sites_table, totals_view
from precision_compiler.report.summary import groups_table, summary
from precision_compiler.workload import load_workload

PLAN = "a plan.json, or a model.onnx that was exported with its plan"


def add_show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that prints a plan."""
    parser = commands.add_parser(
        "show",
        help="print a plan as tables",
        description="Prints a plan: predicted time and error, formats by layer and role.",
        epilog="example: precision-compiler show plan.json --by op",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help=PLAN)
    parser.add_argument(
        "--by", choices=GROUPINGS, help="formats, time and error by layer, operation or role"
    )
    parser.add_argument(
        "--sites", action="store_true", help="also list every site with the reason for its format"
    )
    parser.add_argument(
        "--json", action="store_true", help="totals, counts and groups as JSON, for programs"
    )
    parser.set_defaults(command=_show)


def add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that writes a plan as a page."""
    parser = commands.add_parser(
        "report",
        help="write a plan as one HTML file to browse and share",
        description="Writes a plan as one HTML file that needs no network and no other file: "
        "totals, flags, every site with all of its options, error against time, the journal. "
        "report.html#site=NAME opens a site.",
        epilog="example: precision-compiler report plan.json -o report.html",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help=PLAN)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE",
        help="where to write the page (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--frontier", type=_points, default=12, metavar="N",
        help="draw the fastest plans for N errors, as far as 20 s of solving reach; 0 for none "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(command=_report)


def add_diff(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that compares two plans."""
    parser = commands.add_parser(
        "diff",
        help="compare two plans, site by site and in total",
        description="Lists sites whose format differs, with time and error of both, and totals "
        "that differ. Exit code: 0 if the plans are equal (same graph, formats, target, budget "
        "and totals), 1 if they differ, 2 after an error.",
        epilog="example: precision-compiler diff before.json after.json",
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help=PLAN)
    parser.add_argument("after", type=Path, metavar="AFTER", help="another one")
    parser.add_argument("--json", action="store_true", help="the same as JSON, for programs")
    parser.set_defaults(command=_diff)


def add_edit(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that changes a plan."""
    parser = commands.add_parser(
        "edit",
        help="insist on formats in a plan and decide the rest anew",
        description="Writes a plan with the formats that you insist on, everything else decided "
        "anew from what the plan was decided on: no model is needed, nothing is measured. With "
        "--verify its gradient error is measured on a batch.",
        epilog="example: precision-compiler edit plan.json --override 'head.*=fp32' -o edited.json",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help=PLAN)
    add_overrides(parser)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("edited.json"), metavar="FILE",
        help="where to write the plan (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", metavar="WORKLOAD",
        help="measure the edited plan's gradient error on this workload's first batch",
    )  # fmt: skip
    parser.set_defaults(command=_edit)


def load_plan(path: Path) -> Plan:
    """Reads a plan from its own file, or from the metadata of an exported ONNX model.

    Raises:
        PlanError, ExportError: the file cannot be read, or holds no valid plan.
    """
    return read_plan(path) if path.suffix == ".onnx" else Plan.load(path)


def _show(options: argparse.Namespace) -> None:
    plan, console = load_plan(options.plan), Console()
    if options.json:
        _print_json(summary(plan))
    elif options.by is None:
        show_plan(plan, console, every_site=options.sites)
    else:
        console.print(totals_view(plan))
        console.print(groups_table(plan, options.by))
        if options.sites:
            console.print(sites_table(plan.sites))
        if plan.flags:
            console.print(flags_table(plan.flags))


def _points(word: str) -> int:
    """A number of points of a curve."""
    if not word.isdecimal() or int(word) == 1:
        raise argparse.ArgumentTypeError(f"{word!r} is neither 0 nor a number from 2 on")
    return int(word)


def _report(options: argparse.Namespace) -> None:
    plan = load_plan(options.plan)
    require_folder(options.output)
    frontier = None
    if options.frontier and plan.tables is not None:
        with spinner("solving for other errors") as report:
            frontier = frontier_of_plan(
                plan,
                options.frontier,
                progress=lambda done, of: report(f"solving for error {done + 1} of {of}"),
            )
    write_report(plan, options.output, title=options.plan.name, frontier=frontier)
    Console().print(f"wrote {options.output}", soft_wrap=True)


def _edit(options: argparse.Namespace) -> None:
    before, overrides = load_plan(options.plan), overrides_of(options)
    if not overrides:
        raise PrecisionError("edit: say what to insist on, such as --override 'head.*=fp32'")
    require_folder(options.output)
    with spinner("solving again"):
        after = before.edit(overrides)
    after.save(options.output)
    console = Console()
    show_difference(compare(before, after), console)
    if after.measures == "outputs":
        console.print(
            "the plan of an ONNX file: the file is not changed, and the casts that it would need "
            "are not in the plan's time; `annotate` with another budget writes a file"
        )
    console.print(f"wrote {options.output}", soft_wrap=True)
    if options.verify is not None:
        workload = load_workload(options.verify)
        with spinner("measuring"):
            found = measure_error(workload.model, workload.first_batch(), after, loss=workload.loss)
        console.print(
            f"measured gradient error {found.gradient_error:.3g}, "
            f"predicted {found.predicted_gradient_error:.3g}"
        )


def _diff(options: argparse.Namespace) -> int:
    difference = compare(load_plan(options.before), load_plan(options.after))
    if options.json:
        _print_json(difference.to_dict())
    else:
        show_difference(difference, Console())
    return 0 if difference.equal else 1


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, indent=1))
