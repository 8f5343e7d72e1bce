"""Predicted against measured gradient error, on models with real weights and real text.

Statistics come from one batch, errors are measured on another by running the exact numerics:

* single roundings, site by site;
* whole assignments drawn at random from the formats the plan may choose, and lawless ones drawn
  from all formats, vetoed ones included: every miss beyond 2x must have been flagged before;
* fixed-count assignments: e4m3 in half of the linear layers' products, at random; also for the
  root mean square error on eight batches, from the statistics of one and of eight others;
* plans the solver chose at several budgets, verified on a second batch, measured on a third;
* the same share of e4m3 products chosen by our error, by SQNR, by an op list, by weight error.

Also what the analysis costs in time and memory against a plain forward and backward pass.
Writes JSON after every stage of every model (finished ones are not run again) and a figure.
Run: python benchmarks/error_truth.py -o error_truth.json
"""

import argparse
import datetime
import json
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from predicted_error import COMPUTE_BOUND, target_named
from rich.progress import Progress
from scipy.stats import spearmanr
from zoo import MODELS, Example

import precision_compiler
from precision_compiler.budget import TRUST_REGION, Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.errors import BudgetError
from precision_compiler.files import write_atomically
from precision_compiler.formats import FORMATS, LOG_UNIFORM_SQUARE, rounding_variance
from precision_compiler.journal import Journal
from precision_compiler.measure import measured_machine
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.analyse.raise_flags import RaiseFlags
from precision_compiler.pipeline import Unit
from precision_compiler.problem import Prices, Problem, fixes_result
from precision_compiler.statistics import Sensitivity
from precision_compiler.verification import MOST, Truth

NARROW = ("bf16", "fp16", "e4m3", "e5m2")
POOLS = (("bf16",), ("bf16", "fp16"), ("bf16", "e4m3"), NARROW)
BUDGETS: tuple[float | str, ...] = ("autocast", "auto", 0.02, 0.05, 0.1)
INVALIDATING = ("overflow", "flush", "underflow", "coherent", "invalid")
SHARE = 0.5
CALIBRATION, HELD_OUT = 8, 8  # batches
STAGES = ("single", "random", "lawless", "fixed_count", "plans", "selection")
PEAKS = ("train", "differentiate", "analyse")
MARKS = {"random": "o", "fixed_count": "s", "lawless": "x", "plans": "*"}


@dataclass
class Subject:
    """One model, analysed on one batch, with the float32 truth of another."""

    example: Example
    captured: Captured
    unit: Unit
    problem: Problem
    truth: Truth
    dice: random.Random

    def row(self, assignment: Mapping[str, str]) -> dict[str, Any]:
        """Predicted and measured error of an assignment, and the flags known beforehand."""
        predicted = self.problem.expected_error(assignment)
        found = self.truth.measure(assignment, predicted, self.problem.error(assignment, 2))
        flags = {
            flag.name
            for flag in self.unit.flags
            if flag.name in INVALIDATING and assignment.get(flag.site) == flag.format
        }
        if predicted > TRUST_REGION:
            flags.add("trust-region")
        measured, loss_error = found.gradient_error, found.loss_error
        return {
            "predicted": predicted,
            "first_order": self.problem.error(assignment),  # without flipped choices
            "measured": measured if measured < MOST else None,
            "flags": sorted(flags),
            "loss_error": loss_error if abs(loss_error) < MOST else None,
            "loss_sigma": found.predicted_loss_sigma,
        }


def subject(example: Example) -> tuple[Subject, dict[str, float]]:
    """Capture and analyse; also what the analysis took against forward and backward."""
    source = example.batches(0)
    first, second = next(source), next(source)
    start = time.perf_counter()
    captured = capture(example.model, first, example.loss)
    capturing = time.perf_counter() - start
    unit = Unit(
        captured.joint.copy(), target_named(COMPUTE_BOUND), Budget.parse(1.0), Journal(), captured
    )
    assert unit.links is not None
    assert captured.gradients is not None
    plain, analysed = [], []
    for _ in range(3):  # alternating, so that slow phases of the machine hit both alike
        plain.append(_seconds(lambda: captured.gradients and captured.gradients(first)))
        analysed.append(_seconds(lambda: MeasureSensitivity().run(unit)))
    RaiseFlags().run(unit)
    assert unit.statistics is not None
    zero = [tensor.name for tensor in unit.statistics.tensors if tensor.is_zero]
    truth = Truth(captured.on(second), zero)
    problem = Problem(unit.links, _options(unit), Prices({}, {}, {}), unit.statistics)
    ratios = [one / other for one, other in zip(analysed, plain, strict=True)]
    cost = {
        "capture_seconds": capturing,
        "forward_backward_seconds": statistics.median(plain),
        "analysis_seconds": statistics.median(analysed),
        "analysis_over_forward_backward": statistics.median(ratios),
        "nodes": len(captured.joint.module.graph.nodes),
        "sites": len(unit.joint.sites),
    }
    return Subject(example, captured, unit, problem, truth, random.Random(0)), cost


def _seconds(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _options(unit: Unit) -> dict[str, tuple[str, ...]]:
    return {
        site.name: tuple(
            name for name in unit.formats_for(site.kind) if (site.name, name) not in unit.vetoes
        )
        for site in unit.joint.sites
    }


def drawn(it: Subject, lawless: bool) -> dict[str, str]:
    """A random assignment; unless lawless, of formats that are not vetoed and results that fit."""
    pool, density = it.dice.choice(POOLS), it.dice.uniform(0.05, 1.0)
    links, options = it.unit.links, it.problem.options

    def pick(site: str, formats: tuple[str, ...]) -> str:
        open_ones = [name for name in formats if lawless or name in options[site]]
        narrow = open_ones and it.dice.random() < density
        return it.dice.choice(open_ones) if narrow else "fp32"

    chosen = {name: pick(name, pool) for name in links.contractions}
    for store in links.stores:
        writer = links.writer.get(store)
        returned = chosen[writer] if writer is not None else "fp32"
        if fixes_result(returned) and returned != "fp32":
            chosen[store] = returned
        else:
            kept = pool if lawless else tuple(name for name in pool if fixes_result(name))
            chosen[store] = pick(store, kept) if kept else "fp32"
    return chosen


def single_rows(it: Subject, count: int) -> Iterator[dict[str, Any]]:
    """Single sites in single formats, everything else in float32."""
    cases = [(site, fmt) for site, known in it.problem.options.items() for fmt in known[1:]]
    for site, fmt in it.dice.sample(cases, min(count, len(cases))):
        yield {"site": site, "format": fmt} | it.row(it.problem.uniform() | {site: fmt})


def linear_products(it: Subject) -> list[str]:
    """Contractions of layers with a weight: fprop, dgrad and wgrad."""
    sites = it.unit.links.contractions.items()
    return [name for name, site in sites if site.op in ("mm", "addmm")]


def in_e4m3(it: Subject, sites: Any) -> dict[str, str]:
    """The assignment that has e4m3 at the given sites only."""
    return it.problem.uniform() | dict.fromkeys(sites, "e4m3")


def fixed_count_rows(it: Subject, count: int) -> Iterator[dict[str, Any]]:
    """Half of the linear products in e4m3, chosen at random.

    Measured on the first batch too: how well that ranks the errors of the second is as much as
    any statistics of the first could tell. And measured on several others, of which the root mean
    square error has less of chance in it, predicted from the first batch or from several. How well
    the errors on all these but the second rank those of the second is as much as anything could
    tell that does not know the second batch.
    """
    sites = linear_products(it)
    source = it.example.batches(0)
    first, *held_out = [it.captured.on(next(source)) for _ in range(1 + HELD_OUT)]
    known = [first, *(it.captured.on(next(source)) for _ in range(CALIBRATION - 1))]
    several = averaged_problem(it, known)
    truths = [Truth(one, it.truth.zero_gradients) for one in (first, *held_out)]
    for _ in range(count):
        chosen = in_e4m3(it, it.dice.sample(sites, int(SHARE * len(sites))))
        own, *others = [truth.measure(chosen, 0.0, 0.0).gradient_error for truth in truths]
        yield it.row(chosen) | {
            "measured_first": own,
            "predicted_of_several": several.error(chosen),
            "measured_on_several": statistics.mean(error**2 for error in others) ** 0.5,
            "measured_on_others": statistics.mean(error**2 for error in others[1:]) ** 0.5,
        }


def averaged_problem(it: Subject, batches: Sequence[Captured]) -> Problem:
    """The problem as the statistics of several batches tell it."""
    first, *others = batches
    target, budget = target_named(COMPUTE_BOUND), Budget.parse(1.0)
    unit = Unit(first.joint.copy(), target, budget, Journal(), first, calibration=tuple(others))
    MeasureSensitivity().run(unit)
    assert unit.statistics is not None
    return Problem(it.problem.links, it.problem.options, it.problem.prices, unit.statistics)


def selection_rows(it: Subject) -> dict[str, dict[str, Any]]:
    """The same number of linear products in e4m3, chosen by different scores."""
    sites = linear_products(it)
    links = it.unit.links
    alone = {name: it.problem.error(in_e4m3(it, [name])) for name in sites}
    noise = {name: sum(_relative_noise(one) for one in _operands(it, name)) for name in sites}
    roles = ("fprop", "dgrad", "wgrad")
    listed = {
        name: (place == len(sites) // 3 - 1, roles.index(links.contractions[name].role), place)
        for place, name in enumerate(sites)
    }
    weights = {name: _weight_noise(it, name) for name in sites}
    scores: dict[str, Mapping[str, Any]] = {
        "our error": alone, "SQNR": noise, "op list": listed, "weight error": weights,
    }  # fmt: skip
    taken = int(SHARE * len(sites))
    found = {
        label: it.row(in_e4m3(it, sorted(sites, key=score.__getitem__)[:taken]))
        for label, score in scores.items()
    }
    at_random = [it.row(in_e4m3(it, it.dice.sample(sites, taken))) for _ in range(3)]
    return found | {"random": max(at_random, key=lambda row: row["measured"] or 0.0)}


def _operands(it: Subject, site: str) -> list[Sensitivity]:
    assert it.unit.statistics is not None
    return [one for (name, _), one in it.unit.statistics.operands.items() if name == site]


def _relative_noise(tensor: Sensitivity) -> float:
    """Noise over signal of a tensor in e4m3, from its binade counts."""
    fmt = FORMATS["e4m3"]
    exponents = np.arange(-126, 129)
    noise = tensor.count @ rounding_variance(exponents, fmt, tensor.scale_exponent(fmt))
    signal = LOG_UNIFORM_SQUARE * (tensor.count @ np.exp2(2.0 * exponents))
    return float(noise / signal) if signal else 0.0


def _weight_noise(it: Subject, site: str) -> float:
    """Relative error of the layer's weight in e4m3; its three products share it."""
    stem = site.rpartition(".")[0]
    assert it.unit.statistics is not None
    weights = [
        it.unit.statistics.operands[link.contraction, link.argument]
        for link in it.unit.links.reads
        if link.contraction == f"{stem}.fprop" and link.store is None and not link.companion
    ]
    return min(map(_relative_noise, weights), default=1.0)


def plan_rows(it: Subject) -> Iterator[dict[str, Any]]:
    """Plans the solver chose, verified on the second batch and measured on the third."""
    source = it.example.batches(0)
    first, second, third = next(source), next(source), next(source)
    for budget in BUDGETS:
        try:
            plan = precision_compiler.make_plan(
                it.example.model, first, loss=it.example.loss, held_out=second, budget=budget,
                target=target_named(COMPUTE_BOUND),
            )  # fmt: skip
        except BudgetError as error:
            yield {"budget": budget, "refused": str(error)}
            continue
        found = precision_compiler.measure_error(
            it.example.model, third, plan, loss=it.example.loss
        )
        assert plan.verification is not None
        formats = [one.format for one in plan.sites.values() if one.kind == "contraction"]
        yield {
            "budget": budget,
            "limit": plan.budget.limit,
            "bound_by": plan.budget.bound_by,
            "predicted": plan.predicted_gradient_error,
            "verified": plan.verification.measured.gradient_error,
            "measured": found.gradient_error,
            "tensor_error": found.tensor_error,
            "rounds": plan.verification.rounds,
            "passed": plan.verification.passed,
            "flags": sorted({flag.name for flag in plan.flags if not flag.site}),
            "contractions": {name: formats.count(name) for name in sorted(set(formats))},
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation and shares within factors of two and one and a half."""
    finite = [row for row in rows if row["measured"] is not None]
    ratios = [_miss(row) for row in rows]
    unflagged = [_miss(row) for row in rows if not row["flags"]]
    pairs = [(row["predicted"], row["measured"]) for row in finite]
    further = {
        "spearman_of_first_batch": ("measured_first", "measured"),
        "spearman_for_several": ("predicted", "measured_on_several"),
        "spearman_of_several": ("predicted_of_several", "measured_on_several"),
        "spearman_of_first_for_several": ("measured_first", "measured_on_several"),
        "spearman_of_others": ("measured_on_others", "measured"),
    }
    return {
        name: _spearman([(row[one], row[other]) for row in finite])
        for name, (one, other) in further.items()
        if all(one in row and other in row for row in finite)
    } | {
        "count": len(rows),
        "spearman": _spearman(pairs),
        "within_2x": _share(ratios, 2.0),
        "within_1.5x": _share(ratios, 1.5),
        "unflagged": len(unflagged),
        "unflagged_within_1.5x": _share(unflagged, 1.5),
        "misses_beyond_2x_unflagged": sum(ratio > 2.0 for ratio in unflagged),
        "median_measured_over_predicted": statistics.median(
            row["measured"] / row["predicted"] for row in finite if row["predicted"]
        ),
    }


def _spearman(pairs: Sequence[tuple[float, float]]) -> float:
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)


def _miss(row: Mapping[str, Any]) -> float:
    if row["measured"] is None:
        return float("inf")
    if not row["predicted"] or not row["measured"]:
        return 1.0 if row["predicted"] == row["measured"] else float("inf")
    ratio = float(row["measured"] / row["predicted"])
    return max(ratio, 1 / ratio)


def _share(ratios: list[float], most: float) -> float | None:
    return sum(ratio <= most for ratio in ratios) / len(ratios) if ratios else None


def examine(
    name: str,
    count: int,
    wanted: Sequence[str],
    record: dict[str, Any],
    save: Callable[[], None],
    progress: Progress,
) -> None:
    """Everything that is wanted about one model and not in its record yet, saved stage by stage.

    What a stage draws depends on the stage alone.
    """
    task = progress.add_task(f"{name}: analysis", total=None)
    it, cost = subject(MODELS[name]())
    if "cost" not in record:
        record |= {"cost": cost | memory_of(name), "refused": refused(it)}
    stages: dict[str, tuple[int, Any]] = {
        "single": (count, lambda: single_rows(it, count)),
        "random": (count, lambda: (it.row(drawn(it, False)) for _ in range(count))),
        "lawless": (count // 2, lambda: (it.row(drawn(it, True)) for _ in range(count // 2))),
        "fixed_count": (count, lambda: fixed_count_rows(it, count)),
        "plans": (len(BUDGETS), lambda: plan_rows(it)),
    }
    for stage, (total, rows) in stages.items():
        if stage not in wanted or stage in record:
            continue
        progress.reset(task, total=total, description=f"{name}: {stage}")
        it.dice, found = random.Random(stage), []
        for row in rows():
            found.append(row)
            progress.advance(task)
        record[stage] = found
        if stage != "plans":
            record[f"{stage}_summary"] = summary(found)
        save()
    if "selection" in wanted and "selection" not in record:
        it.dice = random.Random("selection")
        record["selection"] = selection_rows(it)
        save()
    progress.update(task, description=f"{name}: done", total=1, completed=1)


def refused(it: Subject) -> dict[str, dict[str, str]]:
    """For fp16 and e4m3, how many tensors of each forward operation are ruled out, and why first.

    Tensors that stay in registers are counted like those that are stored.
    """
    places: dict[str, set[str]] = defaultdict(set)
    for name in it.unit.statistics.ranges if it.unit.statistics else ():
        places[_operation(name)].add(name)
    for name in it.unit.links.stores:
        places[_operation(name)].add(name)
    found: dict[str, dict[str, str]] = {}
    for fmt in ("fp16", "e4m3"):
        found[fmt] = {}
        for operation, names in sorted(places.items()):
            reasons = [it.unit.vetoes[name, fmt] for name in names if (name, fmt) in it.unit.vetoes]
            if reasons and not operation.endswith("grad"):
                found[fmt][operation] = f"{len(reasons)} of {len(names)}, such as {reasons[0]}"
    return found


def _operation(name: str) -> str:
    """The last words of a stable name without numbers: ``layers.3.norm.pow_1`` -> ``pow``."""
    *_, before, last = ("", *name.removesuffix(".store").split("."))
    words = f"{before}.{last}" if last in ("grad", "fprop", "dgrad", "wgrad") else last
    return re.sub(r"_\d+(?=\.|$)", "", words)


def memory_of(name: str) -> dict[str, float]:
    """Peak memory that training and analysis add to a process, each in a process of its own.

    Training with AdamW, and forward and backward alone.
    """
    found = {}
    for what in PEAKS:
        command = [sys.executable, __file__, "--peak-of", what, "--models", name]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        found[f"{what}_peak_bytes"] = float(result.stdout.strip().splitlines()[-1])
    analysis = found["analyse_peak_bytes"]
    found["memory_over_training"] = analysis / found["train_peak_bytes"]
    found["memory_over_forward_backward"] = analysis / found["differentiate_peak_bytes"]
    return found


def print_peak(what: str, name: str) -> None:
    """Print how much the process grows above its imports while it does one of three things.

    Args:
        what: "train" (two steps of AdamW, the first of which makes its moments),
            "differentiate" (forward and backward) or "analyse".
        name: of the model.
    """
    before = _memory("VmRSS")
    example = MODELS[name]()
    batch = next(example.batches(0))
    captured = capture(example.model, batch, example.loss)
    assert captured.gradients is not None
    if what == "analyse":
        target = target_named(COMPUTE_BOUND)
        unit = Unit(captured.joint.copy(), target, Budget.parse(1.0), Journal(), captured)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading and capturing
    if what == "analyse":
        MeasureSensitivity().run(unit)
    elif what == "differentiate":
        assert captured.gradients(batch)
    else:
        weights = [weight for weight in example.model.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights)
        for _ in range(2):
            for weight, gradient in zip(weights, captured.gradients(batch), strict=True):
                weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
    print(_memory("VmHWM") - before)


def _memory(field: str) -> int:
    """Bytes of resident memory now (VmRSS) or at the most so far (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Predicted against measured error of every whole assignment and plan."""
    models = record["models"]
    figure = Figure(figsize=(4 * len(models), 4.2), layout="tight")
    for place, (name, found) in enumerate(models.items()):
        axes = figure.add_subplot(1, len(models), place + 1)
        axes.plot([1e-4, 1], [1e-4, 1], color="grey", lw=1)
        axes.fill_between([1e-4, 1], [5e-5, 0.5], [2e-4, 2], color="grey", alpha=0.15)
        for stage, mark in (
            ("random", "o"),
            ("fixed_count", "s"),
            ("lawless", "x"),
            ("plans", "*"),
        ):
            rows = [row for row in found.get(stage, ()) if row.get("measured")]
            axes.scatter(
                [row["predicted"] for row in rows], [row["measured"] for row in rows],
                marker=mark, s=18, label=stage.replace("_", " "),
            )  # fmt: skip
        axes.set(
            xscale="log", yscale="log", xlim=(3e-4, 1), ylim=(3e-4, 2), title=name,
            xlabel="predicted gradient error", ylabel="measured, on another batch",
        )  # fmt: skip
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run every stage that the output file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("error_truth.json"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--assignments", type=int, default=48, metavar="N",
        help="random assignments per model (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES,
        help="what to do with every model, unless the file has it (default: everything)",
    )  # fmt: skip
    parser.add_argument(
        "--only-cost", action="store_true",
        help="measure time and memory of the analysis anew, in a file that has the rest",
    )  # fmt: skip
    parser.add_argument("--peak-of", choices=PEAKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options.peak_of, options.models[0])
        return
    record: dict[str, Any] = {"assignments": options.assignments, "models": {}}
    if options.output.exists():
        known = json.loads(options.output.read_text())
        record = known if known["assignments"] == options.assignments else record
    record |= {
        "machine": {
            "cpu": measured_machine().description,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "date": datetime.date.today().isoformat(),
    }

    def save() -> None:
        write_atomically(options.output, json.dumps(record, indent=1) + "\n")

    with Progress() as progress:
        for name in options.models:
            if options.only_cost:
                task = progress.add_task(f"{name}: cost", total=None)
                it, cost = subject(MODELS[name]())
                known = record["models"].setdefault(name, {})
                known |= {"cost": cost | memory_of(name), "refused": refused(it)}
                progress.update(task, total=1, completed=1)
                save()
                continue
            known = record["models"].setdefault(name, {})
            if not all(stage in known for stage in options.stages):
                examine(name, options.assignments, options.stages, known, save, progress)
    draw(record, options.output.with_suffix(".png"))
    for name, found in record["models"].items():
        print(name, found.get("random_summary", "no whole assignments"))
    print(f"wrote {options.output} and {options.output.with_suffix('.png')}")


if __name__ == "__main__":
    main()
