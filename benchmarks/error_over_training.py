"""Does a plan keep its budget while the model trains? Its error, measured at steps of training.

A byte decoder trains from random weights in float32. Plans are made before the first step, one of
them after a rehearsal; at some steps their exact numerics run on that step's batch, with the
weights as they are then. Writes JSON after every measurement and a figure beside it.
Run: python benchmarks/error_over_training.py -o error_over_training.json
"""

import argparse
import dataclasses
import datetime
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from predicted_error import compute_bound
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn
from training_parity import PLANS, REHEARSED, Recipe, Task, gpt, learning_rate, train_step

import precision_compiler
from precision_compiler.files import write_atomically
from precision_compiler.measure import measured_machine
from precision_compiler.plan import Plan

NAMES = ("fp8 plan", "mxfp8 plan", "nvfp4 plan", "rehearsed nvfp4 plan")
MEASURED = (1, 10, 25, 50, 100, 200, 400, 700, 1000)


def plan_of(recipe: Recipe, model: nn.Module, task: Task) -> Plan:
    """A plan before the first step; with a rehearsal, on further batches too."""
    batch, *further = islice(task.batches(0), REHEARSED if recipe.rehearsal else 1)
    return precision_compiler.make_plan(
        model, batch, target=compute_bound(recipe.machine, recipe.formats), budget=recipe.budget,
        calibration=further, rehearsal=recipe.rehearsal, learning_rate=task.peak,
    )  # fmt: skip


def row_of(name: str, plan: Plan) -> dict[str, Any]:
    """What is written about one plan; its errors are added as training goes on."""
    formats = Counter(c.format for c in plan.sites.values() if c.kind == "contraction")
    return {
        "plan": name,
        "recipe": dataclasses.asdict(PLANS[name]),
        "predicted": plan.predicted_gradient_error,
        "contractions": dict(formats),
        "errors": {},
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Error by step, a line for each plan."""
    figure = Figure(figsize=(7, 4), layout="tight")
    axes = figure.subplots()
    for row in rows:
        steps = [int(step) for step in row["errors"]]
        axes.plot(steps, list(row["errors"].values()), marker="o", label=row["plan"])
    axes.axhline(0.1, color="0.6", linestyle=":", label="budget")
    axes.set(xscale="log", xlabel="training step", ylabel="relative gradient error", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)


def write(output: Path, rows: list[dict[str, Any]]) -> None:
    """The file and the figure."""
    record = {
        "machine": measured_machine().description,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
        "plans": rows,
    }
    write_atomically(output, json.dumps(record, indent=1) + "\n")
    draw(rows, output.with_suffix(".png"))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """The errors as a table."""
    table = Table("step")
    for row in rows:
        table.add_column(row["plan"], justify="right")
    table.add_row("predicted", *(f"{row['predicted']:.3f}" for row in rows))
    for step in rows[0]["errors"]:
        table.add_row(step, *(f"{row['errors'][step]:.3f}" for row in rows))
    console.print(table)


def main() -> None:
    """Make the plans, train, measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("error_over_training.json"))
    parser.add_argument("--steps", type=int, default=MEASURED[-1], help="(%(default)s)")
    args = parser.parse_args()
    task, console = gpt(), Console()
    model = task.initial(0)
    with Progress(console=console) as progress:
        bar = progress.add_task("plans", total=len(NAMES) + args.steps)
        plans = {}
        for name in NAMES:
            plans[name] = plan_of(PLANS[name], model, task)
            progress.advance(bar)
        rows = [row_of(name, plan) for name, plan in plans.items()]
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
        for step, batch in enumerate(islice(task.batches(0), args.steps), start=1):
            if step in MEASURED:
                for row in rows:
                    found = precision_compiler.measure_error(model, batch, plans[row["plan"]])
                    row["errors"][str(step)] = found.gradient_error
                write(args.output, rows)
            optimizer.param_groups[0]["lr"] = learning_rate(step / args.steps, task.peak)
            train_step(model, batch, "fp32", optimizer)
            progress.update(bar, advance=1, description=f"step {step}")
    show(rows, console)
    console.print(f"Wrote {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
