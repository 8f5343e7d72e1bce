"""The demo: its data is split cleanly, and a small run writes everything it promises."""

import io
import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console

from precision_compiler.demo import Demo, run_demo
from precision_compiler.demo.model import GPT
from precision_compiler.demo.run import PEAK_LEARNING_RATE, learning_rate
from precision_compiler.demo.text import Corpus
from precision_compiler.plan import Plan

TINY = Demo(
    layers=1,
    width=64,
    heads=2,
    length=32,
    batch_size=4,
    most_rounds=12,
    seconds=300,
    evaluations=2,
    held_out=2,
)


def windows(batches: list[tuple[torch.Tensor, torch.Tensor]]) -> set[tuple[int, ...]]:
    return {tuple(row.tolist()) for x, _ in batches for row in x}


def test_held_out_windows_are_never_trained_on() -> None:
    corpus = Corpus(batch_size=8, length=128)
    held_out = windows(corpus.held_out_batches(4))
    training = windows(list(islice(corpus.training_batches(0), 50)))
    assert len(held_out) == 32
    assert not held_out & training


def test_targets_are_the_next_bytes() -> None:
    corpus = Corpus(batch_size=2, length=16)
    for x, y in corpus.held_out_batches(2):
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_batches_repeat_for_the_same_seed() -> None:
    corpus = Corpus(batch_size=2, length=16)
    first = windows(list(islice(corpus.training_batches(1), 3)))
    assert first == windows(list(islice(corpus.training_batches(1), 3)))
    assert first != windows(list(islice(corpus.training_batches(2), 3)))


def test_full_model_has_about_ten_million_parameters() -> None:
    demo = Demo.full()
    model = GPT(demo.layers, demo.width, demo.heads, demo.length)
    assert 10e6 < sum(p.numel() for p in model.parameters()) < 12e6


def test_learning_rate_rises_then_falls_to_a_tenth() -> None:
    rates = [learning_rate(step / 100) for step in range(101)]
    assert max(rates) == pytest.approx(PEAK_LEARNING_RATE)
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(PEAK_LEARNING_RATE / 10)
    assert learning_rate(1.5) == rates[-1]


@pytest.mark.slow
def test_small_run_writes_what_it_promises(tmp_path: Path) -> None:
    stream = io.StringIO()
    folder = tmp_path / "out"
    run_demo(TINY, folder, Console(file=stream, width=120))
    text = stream.getvalue()
    assert str(folder) in text.replace("\n", "")
    assert "fp32" in text
    assert "autocast" in text
    written = {path.name for path in folder.iterdir()}
    assert written == {"plan.json", "loss.png", "model.onnx", "results.json"}
    plan = Plan.load(folder / "plan.json")
    numbers = json.loads((folder / "results.json").read_text())
    assert numbers["predicted_gradient_error"] == plan.predicted_gradient_error
    assert numbers["measured_at"] == [0, 6, 12]
    for variant in numbers["variants"].values():
        assert len(variant["step_seconds"]) == 10
        assert len(variant["validation_loss"]) == 3
        assert variant["validation_loss"][-1] < variant["validation_loss"][0]
        assert variant["saved_bytes"] > 0
    losses = [variant["validation_loss"][-1] for variant in numbers["variants"].values()]
    assert max(losses) < 1.01 * min(losses)
