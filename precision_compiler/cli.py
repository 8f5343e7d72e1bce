"""The command `precision-compiler`: what each subcommand takes, and what it does with it."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from precision_compiler import Target, export_onnx, make_frontier, make_plan
from precision_compiler.backend import without_remarks
from precision_compiler.cli_annotate import add_annotate
from precision_compiler.cli_common import (
    WORKLOAD,
    add_overrides,
    budget_of,
    overrides_of,
    require_folder,
    spinner,
)
from precision_compiler.cli_gpu import add_lower, add_selftest
from precision_compiler.cli_plans import (
    PLAN,
    add_diff,
    add_edit,
    add_report,
    add_show,
    load_plan,
)
from precision_compiler.demo import Demo, run_demo
from precision_compiler.errors import PrecisionError
from precision_compiler.report.explanation import show_explanation
from precision_compiler.report.frontier import draw_frontier, show_frontier
from precision_compiler.report.show import show_plan
from precision_compiler.report.targets import explain_target, show_targets
from precision_compiler.workload import load_workload

DESCRIPTION = """\
Decides, for every operation of a Transformer's training step, which number format it
computes in and which format its result is kept in: as fast as possible, with a gradient
error that stays within a budget. The decision is a plan, a file you can read and ship.
"""
EXAMPLES = """\
start here:
  precision-compiler demo --quick            train a small GPT three ways and compare

then with your own model; train.py has a function `workload` without arguments that
returns precision_compiler.Workload(model, batches):
  precision-compiler plan train.py:workload -o plan.json
  precision-compiler show plan.json --sites
  precision-compiler report plan.json -o report.html
  precision-compiler plan train.py:workload --target h100 --budget 0.01
  precision-compiler pareto train.py:workload --target h100 --plot frontier.png
  precision-compiler export train.py:workload plan.json -o model.onnx
  precision-compiler annotate model.onnx --calibration data.npz -o out.onnx

and in a training script:
  precision_compiler.compile(model, batch)   before the first step
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2 after a mistake of the user, else 0.

    `diff` returns 1 where the plans differ.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = options.command
    try:
        with without_remarks():
            return command(options) or 0
    except PrecisionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="precision-compiler",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_plan(commands)
    _add_pareto(commands)
    add_show(commands)
    add_report(commands)
    _add_explain(commands)
    add_diff(commands)
    add_edit(commands)
    _add_export(commands)
    add_annotate(commands)
    _add_targets(commands)
    add_lower(commands)
    add_selftest(commands)
    return parser


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "demo",
        help="train a small GPT in fp32, with autocast and with a plan, and compare",
        description="Trains a byte-level GPT on the text of Python's own manual, three ways from "
        "the same initial weights: fp32, torch.autocast in bf16, and a plan of this package. "
        "Prints time, loss and gradient error; writes plan.json, loss.png, model.onnx and "
        "results.json. Needs no data and no network; about 10 minutes on 2 cores.",
    )
    parser.add_argument("--quick", action="store_true", help="smaller model, within 3 minutes")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("precision-compiler-demo"),
        metavar="FOLDER",
        help="folder for what it writes (default: %(default)s)",
    )
    parser.set_defaults(command=_demo)


def _add_plan(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "plan",
        help="make a plan for a model and write it to a file",
        description="Captures one training step of the workload's model, predicts time and "
        "gradient error of each choice, and writes the fastest plan within the budget.",
        epilog="example: precision-compiler plan train.py:workload -o plan.json --target h100",
    )
    parser.add_argument("workload", metavar="WORKLOAD", help=WORKLOAD)
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("plan.json"), metavar="FILE",
        help="where to write the plan (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--target", default="auto", metavar="T",
        help="machine to plan for: a name from `precision-compiler targets`, a TOML file, "
        "or auto for this machine (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", default="auto", metavar="B",
        help="largest relative gradient error, such as 0.01; autocast: no more than "
        "torch.autocast in bf16 would cause; noise:0.1: a tenth of the gradient's noise between "
        "mini-batches; auto: the larger of these two, at most 0.2 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=_positive, default=2, metavar="N",
        help="batches of the workload to analyse; the one after them verifies the plan "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--learning-rate", type=float, metavar="LR",
        help="of the training: warns of updates that narrow weights would lose",
    )  # fmt: skip
    parser.add_argument(
        "--rehearse", type=_positive, default=0, metavar="N",
        help="plan for the model as it is after N steps of AdamW in float32, on copies of its "
        "weights (default: %(default)s; 50 for a model that starts from random weights)",
    )  # fmt: skip
    add_overrides(parser)
    parser.add_argument(
        "--sibling", type=Path, metavar="PLAN",
        help="plan of a smaller model of the same kind, to take the errors from, for models on the "
        "meta device",
    )  # fmt: skip
    parser.add_argument(
        "--activation-memory", metavar="SIZE",
        help="most that a step may keep from its forward to its backward pass, such as 40GB",
    )  # fmt: skip
    parser.set_defaults(command=_plan)


def _add_pareto(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "pareto",
        help="show how much time each gradient error buys",
        description="Finds the fastest plan for a row of gradient errors, from none to the largest "
        "that pays, each with a proof of how far from the best it may be. Marks float32, "
        "torch.autocast and the plan for the budget.",
        epilog="example: precision-compiler pareto train.py:workload --target h100 --plot f.png",
    )
    parser.add_argument("workload", metavar="WORKLOAD", help=WORKLOAD)
    parser.add_argument(
        "--target", default="auto", metavar="T",
        help="machine to plan for, as for `plan` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", default="auto", metavar="B",
        help="of the plan that is marked, as for `plan` (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--points", type=_two_or_more, default=20, metavar="N",
        help="errors to find the fastest plan for (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--batches", type=_positive, default=2, metavar="N",
        help="batches of the workload to analyse (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("frontier.json"), metavar="FILE",
        help="where to write the numbers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them, as PNG")
    parser.set_defaults(command=_pareto)


def _add_explain(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain",
        help="say why a site has its format, and what any other would cost",
        description="Solves the plan's decision problem again with each other format forced on a "
        "site, and prints what that costs in time and error and what else would change.",
        epilog="example: precision-compiler explain plan.json blocks.0.fc.wgrad",
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help=PLAN)
    parser.add_argument("site", metavar="SITE", help="a site's name, as `show --sites` lists them")
    parser.set_defaults(command=_explain)


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="write a model with its plan as annotated ONNX",
        description="Writes the forward graph as ONNX with the plan's casts in it and the plan in "
        "its metadata, then checks the file and runs it once.",
        epilog="example: precision-compiler export train.py:workload plan.json -o model.onnx",
    )
    parser.add_argument("workload", metavar="WORKLOAD", help=WORKLOAD)
    parser.add_argument("plan", type=Path, metavar="PLAN", help="the plan made for this workload")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("model.onnx"), metavar="FILE",
        help="where to write the model (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dynamic", action="append", default=[], metavar="INPUT:DIM=NAME,...",
        help="dimensions of an input that stay open, such as 'input_ids:0=batch,1=sequence'; may "
        "be given once for each input",
    )  # fmt: skip
    parser.set_defaults(command=_export)


def _add_targets(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "targets",
        help="list the machines that plans can be made for, or explain one",
        description="Lists the known machines with their memory and the formats they run, or "
        "explains one: every number with its source, the rules of each format.",
        epilog="example: precision-compiler targets show h100",
    )
    parser.add_argument("action", nargs="?", choices=("show",), help="explain one machine")
    parser.add_argument("name", nargs="?", metavar="TARGET", help="its name, or a .toml file")
    parser.set_defaults(command=_targets)


def _demo(options: argparse.Namespace) -> None:
    run_demo(Demo.quick() if options.quick else Demo.full(), options.output, Console())


def _plan(options: argparse.Namespace) -> None:
    workload = load_workload(options.workload)
    require_folder(options.output)
    with spinner("loading the model") as report:
        first, *others = workload.first_batches(options.batches + 1)
        held_out = others.pop() if others else None
        plan = make_plan(
            workload.model,
            first,
            loss=workload.loss,
            target=options.target,
            budget=budget_of(options.budget),
            calibration=others,
            held_out=held_out,
            learning_rate=options.learning_rate,
            rehearsal=options.rehearse,
            activation_memory=options.activation_memory,
            sibling=None if options.sibling is None else load_plan(options.sibling),
            overrides=overrides_of(options),
            progress=report,
        )
    plan.save(options.output)
    console = Console()
    show_plan(plan, console)
    console.print(f"wrote {options.output}", soft_wrap=True)


def _pareto(options: argparse.Namespace) -> None:
    workload = load_workload(options.workload)
    require_folder(options.output)
    if options.plot is not None:
        require_folder(options.plot)
    with spinner("loading the model") as report:
        first, *others = workload.first_batches(options.batches)
        frontier = make_frontier(
            workload.model,
            first,
            points=options.points,
            loss=workload.loss,
            target=options.target,
            budget=budget_of(options.budget),
            calibration=others,
            progress=report,
        )
    frontier.save(options.output)
    console = Console()
    show_frontier(frontier, console)
    console.print(f"wrote {options.output}", soft_wrap=True)
    if options.plot is not None:
        draw_frontier(frontier, options.plot)
        console.print(f"wrote {options.plot}", soft_wrap=True)


def _explain(options: argparse.Namespace) -> None:
    plan = load_plan(options.plan)
    with spinner("solving again"):
        found = plan.explain(options.site)
    show_explanation(found, Console())


def _export(options: argparse.Namespace) -> None:
    workload = load_workload(options.workload)
    plan = load_plan(options.plan)
    require_folder(options.output)
    dynamic = dict(map(_open_sizes, options.dynamic))
    with spinner("exporting"):
        export_onnx(workload.model, workload.first_batch(), plan, options.output, dynamic=dynamic)
    Console().print(f"wrote {options.output}", soft_wrap=True)


def _targets(options: argparse.Namespace) -> None:
    if options.action == "show":
        if options.name is None:
            raise PrecisionError(f"targets show: name one of {', '.join(Target.names())}")
        explain_target(Target.load(options.name), Console())
        return
    with spinner("measuring this machine"):
        targets = [Target.load(name) for name in Target.names()]
    show_targets(targets, Console())


def _open_sizes(text: str) -> tuple[str, dict[int, str]]:
    """``input_ids:0=batch,1=sequence`` as an input's name and its open dimensions."""
    name, _, rest = text.rpartition(":")
    sizes = [part.partition("=") for part in rest.split(",")]
    if not name or not all(number.strip().isdecimal() and label for number, _, label in sizes):
        raise PrecisionError(
            f"--dynamic {text}: write INPUT:DIMENSION=NAME, such as 'input_ids:0=batch,1=sequence'"
        )
    return name.strip(), {int(number): label.strip() for number, _, label in sizes}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be 1 or more")
    return number


def _two_or_more(text: str) -> int:
    if _positive(text) < 2:
        raise argparse.ArgumentTypeError("it must be 2 or more")
    return int(text)
