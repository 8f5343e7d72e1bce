"""The demo from first to last: plan, compile three ways, train in turns, write what came out."""

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

import precision_compiler
from precision_compiler.demo.model import GPT
from precision_compiler.demo.results import Results, print_results, write_results
from precision_compiler.demo.text import Batch, Corpus
from precision_compiler.demo.variant import Variant, relative_error
from precision_compiler.plan import Plan
from precision_compiler.toolchain import require_toolchain

SEED = 0
WARM_ROUNDS = 2
FEWEST_ROUNDS = 8
FEWEST_SECONDS = 20.0
# At 1e-3 the quick form is chaotic: fp32 with random gradient noise as small as bf16's rounding
# ended between 2.907 and 2.963. At 5e-4 the same noise moved the loss by less than 0.03 %.
PEAK_LEARNING_RATE = 5e-4
WARM_UP = 0.1


@dataclass(frozen=True)
class Demo:
    """How large the model is and how long it trains.

    Attributes:
        layers: transformer blocks.
        width: size of the residual stream.
        heads: attention heads.
        length: bytes per window.
        batch_size: windows per batch.
        most_rounds: steps of each variant, if time allows.
        seconds: time from the start within which training should end.
        evaluations: times the held-out loss is measured after training began.
        held_out: batches of held-out text.
    """

    layers: int
    width: int
    heads: int
    length: int
    batch_size: int
    most_rounds: int
    seconds: float
    evaluations: int
    held_out: int

    @classmethod
    def full(cls) -> Self:
        """About 10 million parameters, within 10 minutes on 2 cores."""
        return cls(6, 384, 6, 256, 8, 200, seconds=510, evaluations=8, held_out=4)

    @classmethod
    def quick(cls) -> Self:
        """About 3 million parameters, within 3 minutes on 2 cores."""
        return cls(4, 256, 4, 128, 8, 60, seconds=150, evaluations=6, held_out=4)


def run_demo(demo: Demo, folder: Path, console: Console) -> Results:
    """Trains three ways in turns, prints the comparison and writes it to `folder`.

    Args:
        demo: size of model and training.
        folder: where plan, figure, ONNX model and numbers go; it is created.
        console: where to print.

    Returns:
        Everything that was measured.

    Raises:
        ToolchainError: torch.compile lacks a C++ compiler here.
    """
    started = time.monotonic()
    require_toolchain()
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    corpus = Corpus(demo.batch_size, demo.length)
    model = GPT(demo.layers, demo.width, demo.heads, demo.length)
    held_out = corpus.held_out_batches(demo.held_out)
    batch = next(corpus.training_batches(SEED))
    console.print(
        f"Training a GPT with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters"
        f" on {len(corpus) / 1e3:.0f} kB of Python's manual, three ways from the same weights."
    )
    # All variants share the code of one class, and each is compiled from it.
    with torch._dynamo.config.patch(recompile_limit=64), _progress(console) as progress:
        plan = _make_plan(copy.deepcopy(model), batch, progress)
        plan.save(folder / "plan.json")
        variants = _make_variants(model, batch, plan)
        _compile_and_measure(variants, held_out[0], progress)
        steps = _train(variants, corpus, held_out, demo, started + demo.seconds, progress)
    precision_compiler.export_onnx(model, (batch[0],), plan, folder / "model.onnx")
    results = Results(plan, variants, steps, time.monotonic() - started)
    print_results(results, console)
    write_results(results, demo, folder)
    console.print(f"Wrote plan.json, loss.png, model.onnx and results.json to {folder}/")
    return results


def learning_rate(done: float) -> float:
    """Linear warm-up over a tenth of the training, then a cosine down to a tenth of the peak.

    Args:
        done: fraction of the training that is done.
    """
    if done < WARM_UP:
        return PEAK_LEARNING_RATE * done / WARM_UP
    falling = min(1.0, (done - WARM_UP) / (1 - WARM_UP))
    return PEAK_LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * falling)))


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn())
    return Progress(*columns, TaskProgressColumn(), TimeElapsedColumn(), console=console)


def _make_plan(model: GPT, batch: Batch, progress: Progress) -> Plan:
    task = progress.add_task("calibrate", total=None)
    plan = precision_compiler.make_plan(
        model,
        batch,
        progress=lambda sentence: progress.update(task, description=f"calibrate: {sentence}"),
    )
    progress.update(task, description="calibrate", total=1, completed=1)
    return plan


def _make_variants(model: GPT, batch: Batch, plan: Plan) -> list[Variant]:
    """The same weights three times: fp32, autocast, and `model` itself with the plan."""
    fp32, autocast = copy.deepcopy(model), copy.deepcopy(model)
    fp32.compile()
    autocast.compile()
    precision_compiler.compile(model, batch, plan=plan)
    return [
        Variant("fp32", fp32),
        Variant("autocast", autocast, autocast=True),
        Variant("plan", model),
    ]


def _compile_and_measure(variants: Sequence[Variant], batch: Batch, progress: Progress) -> None:
    """First call of each variant; the first of them is the reference of the gradient error."""
    exact = None
    for variant in progress.track(variants, description="compile"):
        gradient = variant.gradient(batch)
        exact = gradient if exact is None else exact
        variant.gradient_error = relative_error(gradient, exact)
        variant.measure_saved_bytes(batch)


def _train(
    variants: Sequence[Variant],
    corpus: Corpus,
    held_out: Sequence[Batch],
    demo: Demo,
    deadline: float,
    progress: Progress,
) -> list[int]:
    """Trains all variants in turns; returns the steps at which their loss was measured.

    What is done is judged by steps and by time, whichever is further: a machine that is slow, or
    that others use, ends in time with the learning rate down where it belongs.
    """
    task = progress.add_task("train", total=1.0)
    started = time.monotonic()
    seconds = max(deadline - started, FEWEST_SECONDS)
    measured, before = [0], 0.0
    _evaluate(variants, held_out)
    batches = islice(corpus.training_batches(SEED), demo.most_rounds)
    for step, batch in enumerate(batches, start=1):
        done = min(1.0, max(step / demo.most_rounds, (time.monotonic() - started) / seconds))
        _step_in_turns(variants, batch, step, learning_rate(done))
        progress.update(task, completed=done)
        last = done == 1.0 and step >= FEWEST_ROUNDS
        if last or int(done * demo.evaluations) > int(before * demo.evaluations):
            _evaluate(variants, held_out)
            measured.append(step)
        if last:
            break
        before = done
    return measured


def _step_in_turns(variants: Sequence[Variant], batch: Batch, step: int, rate: float) -> None:
    """One step of each; whoever goes first changes, so that none always follows the same one."""
    first = step % len(variants)
    for variant in (*variants[first:], *variants[:first]):
        seconds = variant.step(batch, rate)
        if step > WARM_ROUNDS:
            variant.step_seconds.append(seconds)


def _evaluate(variants: Sequence[Variant], held_out: Sequence[Batch]) -> None:
    """Measures everyone's held-out loss."""
    for variant in variants:
        variant.validation.append(variant.validate(held_out))
