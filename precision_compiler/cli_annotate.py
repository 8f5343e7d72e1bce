"""The subcommand `annotate`: existing ONNX files."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from precision_compiler.annotate import AnnotationReport, annotate_onnx
from precision_compiler.cli_common import budget_of, require_folder, spinner


def add_annotate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The command that gives an existing ONNX file a plan."""
    parser = commands.add_parser(
        "annotate",
        help="decide the formats of an existing ONNX file and write it with them",
        description="Reads a float32 ONNX file for inference (opset 13 to 24), predicts on "
        "calibration data how much each rounding would change its outputs, finds the fastest "
        "formats within the budget and writes the file with them: narrow weights, as few casts as "
        "possible, inputs and outputs as they were, the plan in the metadata. The result is "
        "checked, run in onnxruntime and compared with the original.",
        epilog="example: precision-compiler annotate model.onnx --calibration data.npz "
        "--target h100 -o out.onnx",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a float32 .onnx file")
    parser.add_argument(
        "--calibration", type=Path, nargs="+", required=True, metavar="NPZ",
        help="npz files with an array for every input of the model: numpy.savez(file, name=array)",
    )  # fmt: skip
    parser.add_argument(
        "--held-out", type=Path, nargs="+", metavar="NPZ",
        help="further data, to verify the plan on and to measure the error on as well",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="where to write the model"
    )
    parser.add_argument(
        "--target", default="auto", metavar="T",
        help="machine to plan for, as for `plan` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", default="auto", metavar="B",
        help="largest relative error of the outputs, such as 0.01; autocast: no more than "
        "torch.autocast in bf16 would cause; auto: the same (default: %(default)s)",
    )  # fmt: skip
    parser.set_defaults(command=_annotate)


def _annotate(options: argparse.Namespace) -> None:
    require_folder(options.output)
    with spinner("reading the model") as report:
        found = annotate_onnx(
            options.model,
            options.calibration,
            options.output,
            target=options.target,
            budget=budget_of(options.budget),
            held_out=options.held_out,
            progress=report,
        )
    console = Console()
    console.print(_view(found))
    console.print(f"wrote {options.output}", soft_wrap=True)


def _view(report: AnnotationReport) -> Table:
    totals = report.plan.totals
    measured = f"{report.measured_error:.2g} on the calibration data"
    if report.held_out_error is not None:
        measured += f", {report.held_out_error:.2g} on the held-out data"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "[bold]time",
        f"{totals.predicted_seconds * 1e3:.3g} ms predicted on {report.plan.target} "
        f"(fp32 {totals.fp32_seconds * 1e3:.3g} ms, autocast {totals.autocast_seconds * 1e3:.3g} "
        "ms), all without casts",
    )
    grid.add_row(
        "[bold]error",
        f"{report.predicted_error:.2g} predicted, {measured}; {report.plan.budget.limit:.2g} "
        f"allowed by budget {report.plan.budget.asked}",
    )
    grid.add_row(
        "[bold]graph",
        f"{report.nodes} nodes, {report.casts} casts, {report.constant_casts} of them of constants "
        f"({report.original_casts} in the original)",
    )
    if all(site.format == "fp32" for site in report.plan.sites.values()):
        grid.add_row(
            "[bold]formats",
            f"all fp32: on {report.plan.target}, casts would take longer than narrow formats save, "
            "or the budget allows none",
        )
    return grid
