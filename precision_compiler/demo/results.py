"""What the demo found: as a table, a figure and a file of numbers."""

import datetime
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from precision_compiler.demo.variant import Variant
from precision_compiler.plan import Plan
from precision_compiler.target import Target

FULL_PRECISION = ("fp32", "tf32")
COLUMNS = (
    "ms per\nstep",
    "held-out\nloss",
    "gradient\nerror",
    "\npredicted",
    "\ncasts",
    "MB kept for\nbackward",
)


@dataclass(frozen=True)
class Results:
    """Everything that the demo measured.

    Attributes:
        plan: the plan that the third variant trained with.
        variants: fp32, autocast and ours, in this order.
        measured_at: training steps at which the held-out loss was measured.
        seconds: wall-clock time of the whole demo.
    """

    plan: Plan
    variants: Sequence[Variant]
    measured_at: Sequence[int]
    seconds: float

    def ratios(self, other: int) -> list[float]:
        """Time of variant `other` over ours, for each round of training."""
        ours = self.variants[-1].step_seconds
        theirs = self.variants[other].step_seconds
        return [their / our for their, our in zip(theirs, ours, strict=True)]


def print_results(results: Results, console: Console) -> None:
    """Prints the comparison and what to make of it."""
    console.print(results_table(results))
    for sentence in verdict(results):
        console.print(sentence)


def results_table(results: Results) -> Table:
    """One row for each way of training."""
    plan = results.plan
    predicted = (0.0, plan.totals.autocast_gradient_error, plan.predicted_gradient_error)
    casts = ("-", "-", str(plan.totals.casts))
    table = Table(title=f"{results.measured_at[-1]} steps, alternating")
    table.add_column("")
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for variant, error, count in zip(results.variants, predicted, casts, strict=True):
        exact = variant is results.variants[0]
        table.add_row(
            variant.name,
            f"{variant.median_seconds() * 1e3:.1f}",
            f"{variant.validation[-1]:.4f}",
            "-" if exact else f"{variant.gradient_error:.2g}",
            "-" if exact else f"{error:.2g}",
            count,
            f"{variant.saved_bytes / 1e6:.1f}",
        )
    return table


def verdict(results: Results) -> list[str]:
    """What the numbers say, in sentences."""
    if in_full_precision(results.plan):
        return [
            "Low precision does not pay on this machine: the plan computes and stores everything"
            " in fp32, because no narrower format is predicted to save time."
        ]
    sentences = []
    for index, name in ((0, "fp32"), (1, "autocast")):
        lower, middle, upper = statistics.quantiles(results.ratios(index), n=4)
        pace = "faster" if middle >= 1 else "slower"
        sentences.append(
            f"{max(middle, 1 / middle):.2f}x {pace} per step than {name}"
            f" (half of the rounds between {lower:.2f}x and {upper:.2f}x)."
        )
    return sentences


def in_full_precision(plan: Plan) -> bool:
    """Whether the plan uses no format narrower than 32 bits."""
    return all(choice.format in FULL_PRECISION for choice in plan.sites.values())


def write_results(results: Results, settings: Any, folder: Path) -> None:
    """Writes `results.json` and `loss.png` into `folder`."""
    numbers = as_numbers(results) | {"settings": asdict(settings)}
    (folder / "results.json").write_text(json.dumps(numbers, indent=2) + "\n")
    draw_losses(results, folder / "loss.png")


def as_numbers(results: Results) -> dict[str, Any]:
    """The results as JSON values."""
    return {
        "machine": {
            "processor": Target.load("auto").description,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(results.seconds, 1),
        "measured_at": list(results.measured_at),
        "predicted_gradient_error": results.plan.predicted_gradient_error,
        "predicted_autocast_gradient_error": results.plan.totals.autocast_gradient_error,
        "predicted_seconds": results.plan.predicted_seconds,
        "casts": results.plan.totals.casts,
        "variants": {variant.name: _variant_numbers(variant) for variant in results.variants},
    }


def draw_losses(results: Results, path: Path) -> None:
    """Draws the held-out loss over steps and over time."""
    figure = Figure(figsize=(10, 4), layout="tight")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    for variant, style in zip(results.variants, ("-", "--", ":"), strict=True):
        seconds = [step * variant.median_seconds() for step in results.measured_at]
        by_step.plot(results.measured_at, variant.validation, style, marker="o", ms=3)
        by_time.plot(seconds, variant.validation, style, marker="o", ms=3, label=variant.name)
    by_step.set(xlabel="training steps", ylabel="held-out loss, nats per byte")
    by_time.set(xlabel="seconds of training")
    by_time.legend()
    figure.savefig(path, dpi=120)


def _variant_numbers(variant: Variant) -> dict[str, Any]:
    return {
        "median_step_seconds": variant.median_seconds(),
        "step_seconds": variant.step_seconds,
        "validation_loss": variant.validation,
        "gradient_error": variant.gradient_error,
        "saved_bytes": variant.saved_bytes,
    }
