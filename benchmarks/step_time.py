"""Predicted against measured time of a training step on this machine, for random plans.

Three decoders and encoders, each with plans drawn at random from the formats this machine runs.
Every plan is compiled; then all of a model's plans run in turn, so that slow phases of the
machine hit all alike. The steps of float32 and of autocast's formats, which ``compile`` measures
too, calibrate the predictions of all others ("predicted"; without them: "uncalibrated"). What is
compared is the fastest step, as prices are the fastest times of single operations; the median is
written too. Writes JSON after every model
(finished ones are not run again) and a figure.
Run: python benchmarks/step_time.py -o step_time.json
"""

import argparse
import datetime
import gc
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llama import Llama, Shape
from matplotlib.figure import Figure
from rich.progress import Progress
from scipy.stats import spearmanr
from torch import nn

import precision_compiler
from precision_compiler.backend import without_remarks
from precision_compiler.budget import Budget
from precision_compiler.calibrated import ANCHORS, Calibrated
from precision_compiler.capture import capture
from precision_compiler.demo.model import GPT
from precision_compiler.files import write_atomically
from precision_compiler.journal import Journal
from precision_compiler.measure import measured_machine
from precision_compiler.passes import DECIDE
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.problem import Problem, fixes_result
from precision_compiler.record import plan_of_unit
from precision_compiler.target import Target

POOLS = (("bf16",), ("bf16",), ("fp16",), ("bf16", "fp16"))
WITHIN = 0.15
Case = tuple[nn.Module, Any]


def gpt() -> Case:
    torch.manual_seed(0)
    model = GPT(layers=3, width=384, heads=6, length=128)
    tokens = torch.randint(90, (8, 129))
    return model, (tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())


def llama() -> Case:
    torch.manual_seed(0)
    model = Llama(Shape(3, 512, 1408, 8, 4, 4096), 128)
    return model, torch.randint(4096, (4, 129))


class Encoder(nn.Module):
    """A bidirectional encoder of torch's own layers that classifies sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, 256)
        layer = nn.TransformerEncoderLayer(256, 4, 1024, 0.0, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(256, 16)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = self.head(self.layers(self.embed(tokens)).mean(1))
        return nn.functional.cross_entropy(found, labels)


def encoder() -> Case:
    torch.manual_seed(0)
    return Encoder(), (torch.randint(8192, (16, 128)), torch.randint(16, (16,)))


MODELS: dict[str, Callable[[], Case]] = {"gpt": gpt, "llama": llama, "encoder": encoder}


def drawn(problem: Problem, dice: random.Random) -> dict[str, str]:
    """A random legal assignment; results of contractions have the format these return."""
    pool, density, links = dice.choice(POOLS), dice.uniform(0.1, 1.0), problem.links
    formats = {
        name: dice.choice(pool) if dice.random() < density else "fp32"
        for name in links.contractions
    }
    for store in links.stores:
        writer = links.writer.get(store)
        returned = formats[writer] if writer is not None else "fp32"
        narrow = dice.choice(pool) if dice.random() < density else "fp32"
        formats[store] = returned if fixes_result(returned) and returned != "fp32" else narrow
    return formats


def decided(model: nn.Module, batch: Any) -> Unit:
    """Everything the compiler knows of a model on this machine."""
    captured = capture(model, batch)
    unit = Unit(captured.joint.copy(), Target.load("auto"), Budget.parse(0.02), Journal(), captured)
    Pipeline(DECIDE).run(unit)
    return unit


def step(model: nn.Module, batch: Any) -> float:
    """Seconds of one forward and backward pass."""
    arguments = batch if isinstance(batch, tuple) else (batch,)
    start = time.perf_counter()
    model(*arguments).backward()
    elapsed = time.perf_counter() - start
    model.zero_grad(set_to_none=True)
    return elapsed


def examined(name: str, count: int, turns: int, progress: Progress) -> dict[str, Any]:
    """Predicted and measured step times of one model's plans."""
    model, batch = MODELS[name]()
    task = progress.add_task(f"{name}: analysis", total=count + 2)
    unit = decided(model, batch)
    base, dice = plan_of_unit(unit, "the model's own loss"), random.Random(0)
    chosen = {"fp32": unit.problem.uniform(), "autocast": unit.baseline, "solver": unit.assignment}
    chosen |= {f"random {index}": drawn(unit.problem, dice) for index in range(count)}
    compiled: dict[str, nn.Module] = {}
    for label, formats in chosen.items():
        progress.update(task, description=f"{name}: compiling {label}", advance=1)
        twin, _ = MODELS[name]()
        compiled[label] = precision_compiler.compile(twin, plan=base.with_formats(formats))
        step(twin, batch)
    seconds: dict[str, list[float]] = {label: [] for label in compiled}
    progress.update(task, description=f"{name}: measuring", total=turns, completed=0)
    for _ in range(turns):
        for label, twin in compiled.items():
            seconds[label].append(step(twin, batch))
        progress.advance(task)
    del compiled
    gc.collect()
    rows = [
        {
            "plan": label,
            "uncalibrated": unit.problem.seconds(chosen[label]),
            "fastest": min(times),
            "median": statistics.median(times),
        }
        for label, times in seconds.items()
    ]
    found = {"kernels": len(unit.kernels), "fixed_seconds": unit.fixed_seconds, "rows": rows}
    return calibrated(found)


def calibrated(found: dict[str, Any]) -> dict[str, Any]:
    """The measurements of one model with calibrated predictions."""
    prices = {row["plan"]: row["uncalibrated"] for row in found["rows"]}
    rule = Calibrated.by_anchors(prices, {row["plan"]: row["fastest"] for row in found["rows"]})
    assert rule is not None
    rows = [row | {"predicted": rule.seconds(row["uncalibrated"])} for row in found["rows"]]
    return found | {"rate": rule.rate, "calibrated_fixed_seconds": rule.fixed, "rows": rows}


def summary(models: Mapping[str, Any]) -> dict[str, Any]:
    """Share of the plans within 15 % and rank correlation; the two that calibrate left out."""
    rows = {name: [r for r in m["rows"] if r["plan"] not in ANCHORS] for name, m in models.items()}
    every = [row for found in rows.values() for row in found]
    by_model = {name: _agreement(found) for name, found in rows.items()}
    return _agreement(every) | {"by_model": by_model}


def _agreement(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"plans": len(rows)}
    for key in ("predicted", "uncalibrated"):
        ratios = [row[key] / row["fastest"] for row in rows]
        pairs = zip(*((row[key], row["fastest"]) for row in rows), strict=True)
        found[key] = {
            "within_15_percent": sum(abs(ratio - 1) <= WITHIN for ratio in ratios) / len(ratios),
            "spearman": float(spearmanr(*pairs).statistic),
            "median_ratio": statistics.median(ratios),
        }
    return found


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Predicted against measured step time of every plan."""
    figure = Figure(figsize=(5, 5), layout="tight")
    axes = figure.subplots()
    for name, found in record["models"].items():
        pairs = [(1e3 * row["fastest"], 1e3 * row["predicted"]) for row in found["rows"]]
        axes.scatter(*zip(*pairs, strict=True), s=14, label=name)
    edges = [*axes.get_xlim(), *axes.get_ylim()]
    line = [min(edges), max(edges)]
    axes.plot(line, line, color="gray", linewidth=0.8)
    axes.fill_between(
        line, [x * (1 - WITHIN) for x in line], [x * (1 + WITHIN) for x in line],
        color="gray", alpha=0.15,
    )  # fmt: skip
    axes.set(xlabel="fastest measured step, ms", ylabel="predicted, ms")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("step_time.json"))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--plans", type=int, default=10, help="random plans per model")
    parser.add_argument("--turns", type=int, default=20, help="steps per plan")
    options = parser.parse_args()
    record: dict[str, Any] = {"models": {}}
    if options.output.exists():
        record = json.loads(options.output.read_text())
        record["models"] = {name: calibrated(found) for name, found in record["models"].items()}
    with Progress() as progress, without_remarks():
        for name in options.models:
            if name in record["models"]:
                continue
            record["models"][name] = examined(name, options.plans, options.turns, progress)
            machine = measured_machine()
            record["machine"] = f"{machine.description}, {machine.threads} threads"
            record["torch"], record["date"] = torch.__version__, str(datetime.date.today())
            record["summary"] = summary(record["models"])
            write_atomically(options.output, json.dumps(record, indent=1))
            draw(record, options.output.with_suffix(".png"))
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
