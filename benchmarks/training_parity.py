"""Does training with a plan end where fp32 training ends? Loss curves over several seeds.

Two workloads: a byte decoder from scratch and BERT-tiny fine-tuned on six kinds of fortunes. All
variants of a seed start from the same weights and see the same batches in the same order; seeds
differ in the order (and the decoder's weights). What runs is judged in its own precision.
Writes JSON after every run and a figure beside it; runs that the file has are not run again, so
delete it after changing the library. Run it alone: small operations on two threads take up to a
hundred times as long where another program has one of the cores, and the plan for this machine
would rest on such times.
Run: python benchmarks/training_parity.py -o training_parity.json
"""

import argparse
import dataclasses
import datetime
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from predicted_error import compute_bound
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from zoo import IGNORED, bert_tiny_folder, load_transformers, shuffled

import precision_compiler
from precision_compiler.budget import Budget
from precision_compiler.demo.model import GPT
from precision_compiler.demo.text import Corpus
from precision_compiler.errors import BudgetError
from precision_compiler.files import write_atomically
from precision_compiler.measure import measured_machine
from precision_compiler.plan import Plan

GPT_SIZE = {"layers": 3, "width": 192, "heads": 3, "length": 128}
GPT_BATCH, GPT_HELD_OUT = 8, 16
FORTUNES = Path("/usr/share/games/fortunes")
KINDS = ("computers", "songs-poems", "politics", "science", "startrek", "definitions")
FORTUNE_TOKENS, FORTUNE_BATCH, FORTUNES_HELD_OUT = 64, 32, 600
WARM_UP = 0.1  # of the steps, linear; then a cosine down to a tenth of the peak
EVALUATIONS = 20
REHEARSED = 4  # batches that a rehearsal trains on in turn
UNTIMED = 3  # first steps, which compile


@dataclass(frozen=True)
class Recipe:
    """How a variant's plan is made; on `machine` with `formats`, within `budget`.

    Attributes:
        machine: a shipped target without memory's limits, emulated; "auto" for this machine.
        formats: that plans choose from.
        budget: largest relative gradient error.
        uniform: the first of these that a matrix product may have, whatever the solver says.
        nearest: leave out recipes, such as stochastic rounding of gradients.
        rehearsal: steps in float32 on copies of the weights, before errors are measured.
    """

    machine: str
    formats: tuple[str, ...]
    budget: float | str
    uniform: tuple[str, ...] = ()
    rehearsal: int = 0
    nearest: bool = False


WIDE = ("fp32", "bf16")
PLANS = {
    "plan": Recipe("auto", (), "auto"),
    "fp8 plan": Recipe("h100", (*WIDE, "tf32", "fp16", "e4m3", "e5m2"), 0.1),
    "mxfp8 plan": Recipe("b200", (*WIDE, "mxfp8"), 0.1),
    "nvfp4 plan": Recipe("b200", (*WIDE, "mxfp8", "nvfp4"), 0.1),
    "rehearsed nvfp4 plan": Recipe("b200", (*WIDE, "mxfp8", "nvfp4"), 0.1, rehearsal=50),
    "nearest nvfp4 plan": Recipe(
        "b200", (*WIDE, "mxfp8", "nvfp4"), 0.1, rehearsal=50, nearest=True
    ),
    "all nvfp4": Recipe("b200", (*WIDE, "nvfp4"), 1.0, ("nvfp4", "nvfp4_sr")),
}
VARIANTS = ("fp32", "autocast", *PLANS)
TOLERANCE = 0.0025  # relative loss error that published fp8 training stays within

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """A workload: where training starts, and what it trains and is judged on.

    Attributes:
        name: on the command line and in the file.
        recipe: all that decides how training runs, in words.
        peak: highest learning rate.
        initial: the model for a seed, with the same weights at each call.
        batches: training batches for a seed, without end.
        held_out: batches of the same shape; rows with label -100 do not count.
    """

    name: str
    recipe: str
    peak: float
    initial: Callable[[int], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    held_out: Sequence[Any]


def gpt() -> Task:
    """The demo's decoder over bytes, from random weights."""
    corpus, peak = Corpus(GPT_BATCH, GPT_SIZE["length"]), 5e-4

    def initial(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(**GPT_SIZE)

    held_out = corpus.held_out_batches(GPT_HELD_OUT)
    recipe = f"GPT {GPT_SIZE}, batch {GPT_BATCH}, AdamW {peak}"
    return Task("gpt", recipe, peak, initial, corpus.training_batches, held_out)


def bert() -> Task:
    """BERT-tiny that learns which of six kinds a fortune is of; without dropout."""
    rows, peak = fortunes(), 1e-4  # at 3e-4 it overfits before step 1000
    order = torch.randperm(len(rows["labels"]), generator=torch.Generator().manual_seed(0))
    held_out, training = order[:FORTUNES_HELD_OUT], order[FORTUNES_HELD_OUT:]

    def chosen(picks: Tensor) -> dict[str, Tensor]:
        missing = FORTUNE_BATCH - len(picks)
        batch = {key: value[F.pad(picks, (0, missing))] for key, value in rows.items()}
        batch["labels"][len(picks) :] = IGNORED
        return batch

    def batches(seed: int) -> Iterator[dict[str, Tensor]]:
        yield from map(
            chosen, shuffled(training, FORTUNE_BATCH, torch.Generator().manual_seed(seed))
        )

    recipe = f"BERT-tiny, {len(training)} fortunes, batch {FORTUNE_BATCH}, AdamW {peak}"
    judged_on = [chosen(picks) for picks in held_out.split(FORTUNE_BATCH)]
    return Task("bert", recipe, peak, lambda _seed: bert_classifier(), batches, judged_on)


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "bert": bert}


def bert_classifier() -> nn.Module:
    """BERT-tiny with a new classifier on top, the same for every seed."""
    torch.manual_seed(0)
    model: nn.Module = load_transformers().BertForSequenceClassification.from_pretrained(
        bert_tiny_folder(), num_labels=len(KINDS), problem_type="single_label_classification",
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return model.train()


def fortunes() -> dict[str, Tensor]:
    """All fortunes of the six kinds as padded tokens, with attention mask and labels.

    Raises:
        SystemExit: they are not installed; says how to install them.
    """
    if not FORTUNES.is_dir():
        raise SystemExit(f"the bert workload reads {FORTUNES}: apt-get install fortunes")
    texts, labels = [], []
    for label, kind in enumerate(KINDS):
        source = (FORTUNES / kind).read_text(encoding="utf-8", errors="replace")
        found = [item.strip() for item in source.split("\n%\n") if len(item.strip()) > 20]
        texts += found
        labels += [label] * len(found)
    tokenizer = load_transformers().AutoTokenizer.from_pretrained(bert_tiny_folder())
    padded = tokenizer(
        texts, padding="max_length", truncation=True, max_length=FORTUNE_TOKENS, return_tensors="pt"
    )
    masked = {key: padded[key] for key in ("input_ids", "attention_mask")}
    return masked | {"labels": torch.tensor(labels)}


def recipe_of(variant: str, budget: str | None) -> Recipe | None:
    """The recipe of a variant with a plan; an emulated one may get another budget.

    The budget of a uniform plan decides nothing, and that for this machine is the default one.
    """
    recipe = PLANS.get(variant)
    if recipe is None or budget is None or recipe.machine == "auto" or recipe.uniform:
        return recipe
    return dataclasses.replace(recipe, budget=budget)


def compile_variant(recipe: Recipe | None, model: nn.Module, task: Task, seed: int) -> Plan | None:
    """Compile the model in place, by a plan if there is a recipe for one; returns the plan."""
    torch._dynamo.reset()  # frees what the run before compiled
    if recipe is None:
        model.compile()
        return None
    batch, *further = islice(task.batches(seed), REHEARSED if recipe.rehearsal else 1)
    if recipe.machine == "auto":
        plan = precision_compiler.make_plan(model, batch, budget=recipe.budget)
        precision_compiler.compile(model, plan=plan)
        return plan
    target = compute_bound(recipe.machine, recipe.formats)
    target = target.with_recipes() if recipe.nearest else target
    plan = precision_compiler.make_plan(
        model, batch, target=target, budget=recipe.budget, calibration=further,
        rehearsal=recipe.rehearsal, learning_rate=task.peak,
    )  # fmt: skip
    if recipe.uniform:
        plan = plan.with_formats(uniform(plan, recipe.uniform))
    precision_compiler.emulate(model, plan)
    return plan


def uniform(plan: Plan, formats: Sequence[str]) -> dict[str, str]:
    """The first format that every product may have; what the plan has for everything else."""
    found = {}
    for name, choice in plan.sites.items():
        open_ones = {fmt for fmt, option in choice.options.items() if option.veto is None}
        found[name] = next((fmt for fmt in formats if fmt in open_ones), choice.format)
    return found


def run(task: Task, row: Record, steps: int, tick: Callable[[], object]) -> Record:
    """Train what `missing` found to be left; `tick` is called after each step."""
    seed, variant = row["seed"], row["variant"]
    recipe, model = recipe_of(variant, row["settings"].get("budget")), task.initial(seed)
    plan = compile_variant(recipe, model, task, seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True)
    curve, seconds = [evaluate(model, task, variant, 0)], []
    for step, batch in enumerate(islice(task.batches(seed), steps), start=1):
        optimizer.param_groups[0]["lr"] = learning_rate(step / steps, task.peak)
        seconds.append(train_step(model, batch, variant, optimizer))
        if step * EVALUATIONS // steps > (step - 1) * EVALUATIONS // steps:
            curve.append(evaluate(model, task, variant, step))
        tick()
    timed = seconds[UNTIMED:] or seconds
    return {
        "validation": curve,
        "final_validation_loss": curve[-1]["loss"],
        "mean_step_ms": 1e3 * statistics.fmean(timed),
        "fastest_step_ms": 1e3 * min(timed),
        "plan": None if recipe is None or plan is None else plan_numbers(recipe, plan),
    }


def train_step(
    model: nn.Module, batch: Any, variant: str, optimizer: torch.optim.Optimizer
) -> float:
    """One step of training; returns the seconds that it took."""
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss, _ = loss_and_output(model, batch, variant)
    loss.backward()
    optimizer.step()
    return time.perf_counter() - started


def learning_rate(done: float, peak: float) -> float:
    """Linear warm-up, then a cosine; `done` is the fraction of the training that is done."""
    if done < WARM_UP:
        return peak * done / WARM_UP
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))))


def loss_and_output(model: nn.Module, batch: Any, variant: str) -> tuple[Tensor, Any]:
    """One forward pass in the variant's precision."""
    context: AbstractContextManager[Any] = nullcontext()
    if variant == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    with context:
        output = model(**batch) if isinstance(batch, dict) else model(*batch)
    return (output if isinstance(output, Tensor) else output.loss), output


def evaluate(model: nn.Module, task: Task, variant: str, step: int) -> Record:
    """Held-out loss, and accuracy where there are classes.

    Gradients stay enabled, so that the graph that trains is the graph that is judged.
    """
    total, count, correct = 0.0, 0, 0
    for batch in task.held_out:
        loss, output = loss_and_output(model, batch, variant)
        labels = batch["labels"] if isinstance(batch, dict) else batch[1]
        judged = int((labels != IGNORED).sum())
        total += judged * loss.item()
        count += judged
        if not isinstance(output, Tensor):
            correct += int((output.logits.argmax(-1) == labels).sum())
    point: Record = {"step": step, "loss": total / count}
    return point if isinstance(output, Tensor) else point | {"accuracy": correct / count}


def plan_numbers(recipe: Recipe, plan: Plan) -> Record:
    """What a plan is for and predicts, and how many contractions it has in each format."""
    formats = [choice.format for choice in plan.sites.values() if choice.kind == "contraction"]
    return {
        "recipe": dataclasses.asdict(recipe),
        "predicted_gradient_error": plan.predicted_gradient_error,
        "predicted_seconds": plan.predicted_seconds,
        "contractions": {name: formats.count(name) for name in sorted(set(formats))},
    }


def settings_of(task: Task, steps: int, budget: str | None) -> Record:
    """What runs must share to be compared with each other; a budget only where one is asked for."""
    asked: Record = {} if budget is None else {"budget": budget}
    return {
        "workload": task.name,
        "recipe": task.recipe,
        "steps": steps,
        "torch": torch.__version__,
        "machine": measured_machine().description,
        "threads": torch.get_num_threads(),
        **asked,
    }


def summarise(runs: Sequence[Record]) -> Record:
    """Each variant against fp32 of the same seed, and how far fp32 itself varies with the seed.

    Takes runs of one workload and the same settings, and notes the difference in each.
    """
    exact = {row["seed"]: row["final_validation_loss"] for row in runs if row["variant"] == "fp32"}
    losses = list(exact.values())
    spread = statistics.stdev(losses) / statistics.fmean(losses) if len(losses) > 1 else 0.0
    summary: Record = {"fp32_spread_over_seeds": spread, "variants": {}}
    for variant in VARIANTS:
        rows = [row for row in runs if row["variant"] == variant and row["seed"] in exact]
        for row in rows:
            reference = exact[row["seed"]]
            row["relative_difference"] = row["final_validation_loss"] / reference - 1
        if rows:
            summary["variants"][variant] = summary_row(rows, max(TOLERANCE, spread))
    return summary


def summary_row(rows: Sequence[Record], allowed: float) -> Record:
    """One variant over all seeds."""
    mean = statistics.fmean
    difference = mean(row["relative_difference"] for row in rows)
    numbers: Record = {
        "seeds": len(rows),
        "final_validation_loss": mean(row["final_validation_loss"] for row in rows),
        "mean_relative_difference": difference,
        "within": abs(difference) <= allowed,
        "mean_step_ms": mean(row["mean_step_ms"] for row in rows),
    }
    if "accuracy" in rows[0]["validation"][-1]:
        numbers["accuracy"] = mean(row["validation"][-1]["accuracy"] for row in rows)
    return numbers


def write(output: Path, runs: Sequence[Record], wanted: Sequence[Record]) -> Record:
    """Write the file and the figure; returns the summary of each workload.

    It is of the runs with wanted settings; of a workload that is not wanted now, of the latest.
    """
    settings = {row["settings"]["workload"]: row["settings"] for row in runs}
    settings |= {each["workload"]: each for each in wanted}
    same = {name: [row for row in runs if row["settings"] == settings.get(name)] for name in TASKS}
    started = {name: rows for name, rows in same.items() if rows}
    summary = {name: summarise(rows) for name, rows in started.items()}
    record = {
        "machine": measured_machine().description,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "tolerance": TOLERANCE,
        "summary": summary,
        "runs": list(runs),
    }
    write_atomically(output, json.dumps(record, indent=1) + "\n")
    draw(started, output.with_suffix(".png"))
    return summary


def draw(workloads: dict[str, list[Record]], path: Path) -> None:
    """For each workload: held-out loss, difference to fp32, and accuracy where there are classes.

    A line is one seed, a colour one variant.
    """
    figure = Figure(figsize=(15, 4 * len(workloads)), layout="tight")
    axes = figure.subplots(len(workloads), 3, squeeze=False)
    for (name, rows), panels in zip(workloads.items(), axes, strict=True):
        exact = {row["seed"]: row for row in rows if row["variant"] == "fp32"}
        for row in rows:
            draw_run(row, exact[row["seed"]], panels)
        titles = (f"{name}: held-out loss", "difference to fp32 of the same seed, %", "accuracy")
        for panel, title in zip(panels, titles, strict=True):
            panel.set(xlabel="training steps", title=title)
        panels[0].legend()
        panels[1].axhspan(-100 * TOLERANCE, 100 * TOLERANCE, color="0.9", zorder=0)
        if not panels[2].lines:
            panels[2].set_visible(False)
    figure.savefig(path, dpi=120)


def draw_run(row: Record, exact: Record, panels: Sequence[Axes]) -> None:
    """One line in each panel of a workload; the legend names each variant once."""
    first = row["seed"] == 0
    color = f"C{VARIANTS.index(row['variant'])}"
    steps, losses, references = (
        [point[key] for point in curve["validation"]]
        for curve, key in ((row, "step"), (row, "loss"), (exact, "loss"))
    )
    panels[0].plot(steps, losses, label=row["variant"] if first else None, color=color)
    percent = [100 * (loss / other - 1) for loss, other in zip(losses, references, strict=True)]
    panels[1].plot(steps, percent, color=color)
    if "accuracy" in row["validation"][0]:
        panels[2].plot(steps, [point["accuracy"] for point in row["validation"]], color=color)


def print_summary(summary: Record, console: Console) -> None:
    """One table for each workload."""
    for name, found in summary.items():
        spread = found["fp32_spread_over_seeds"]
        table = Table(title=f"{name}: fp32 varies by {spread:.2%} with the seed")
        for heading in ("", "held-out loss", "to fp32", "within", "accuracy", "ms per step"):
            table.add_column(heading, justify="right" if heading else "left")
        for variant, row in found["variants"].items():
            table.add_row(
                variant,
                f"{row['final_validation_loss']:.4f}",
                f"{row['mean_relative_difference']:+.3%}",
                "yes" if row["within"] else "no",
                f"{row['accuracy']:.3f}" if "accuracy" in row else "-",
                f"{row['mean_step_ms']:.0f}",
            )
        console.print(table)


def known_runs(output: Path) -> list[Record]:
    """The runs that the file has."""
    if not output.exists():
        return []
    runs: list[Record] = json.loads(output.read_text(encoding="utf-8"))["runs"]
    return runs


def missing(
    tasks: Sequence[Task],
    wanted: Sequence[Record],
    seeds: int,
    variants: Sequence[str],
    runs: Sequence[Record],
) -> Iterator[tuple[Task, Record]]:
    """What is left to run: the task and what will identify the run in the file."""
    for task, settings in zip(tasks, wanted, strict=True):
        for seed, variant in product(range(seeds), variants):
            row: Record = {"settings": settings, "seed": seed, "variant": variant}
            if not any(row == {key: known[key] for key in row} for known in runs):
                yield task, row


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("training_parity.json"),
        help="JSON file to write or continue; the figure is written beside it (%(default)s)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=1000, help="of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="(all)"
    )
    parser.add_argument(
        "--workload", choices=[*TASKS, "both"], default="both", help="(%(default)s)"
    )
    parser.add_argument(
        "--budget", type=budget_text, metavar="B",
        help="of emulated plans, such as 0.05, autocast or noise:0.1, in place of their own "
        "(0.1); runs with another budget are not compared, fp32 runs again for each",
    )  # fmt: skip
    return parser.parse_args()


def budget_text(text: str) -> str:
    """A budget as ``make_plan`` takes it, equal ones spelt alike.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return Budget.parse(text).asked
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    """Run what the file lacks, and print what it says in the end."""
    args = parsed()
    tasks = [make() for name, make in TASKS.items() if args.workload in (name, "both")]
    wanted = [settings_of(task, args.steps, args.budget) for task in tasks]
    runs = known_runs(args.output)
    rows = list(missing(tasks, wanted, args.seeds, args.variants, runs))
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(rows) * args.steps)
        for task, row in rows:
            seed, variant = row["seed"], row["variant"]
            progress.update(bar, description=f"{task.name}, seed {seed}, {variant}")
            found = run(task, row, args.steps, lambda: progress.advance(bar))
            runs.append(row | found)
            write(args.output, runs, wanted)
            gc.collect()  # compiled models are cycles
    print_summary(write(args.output, runs, wanted), console)
    console.print(f"Wrote {args.output} and {args.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
