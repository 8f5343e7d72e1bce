"""Predicted against measured gradient error of solver-chosen plans on several small models.

For each model, target and budget: make a plan on one batch, then run the rewritten joint graph
without Inductor on the same batch and on another, and compare with float32. Writes JSON.
Run: python benchmarks/predicted_error.py -o predicted_error.json
"""

import argparse
import datetime
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import precision_compiler
from precision_compiler.capture import capture
from precision_compiler.compiler import rewritten
from precision_compiler.demo.model import GPT
from precision_compiler.measure import measured_machine
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.target import Target

VOCABULARY, LENGTH, BATCH = 128, 64, 8
COMPUTE_BOUND = "h100 without launch and memory time"
CASES = (
    ("cpu", "autocast"),
    ("h100", "autocast"),
    (COMPUTE_BOUND, "autocast"),
    (COMPUTE_BOUND, 0.03),
    (COMPUTE_BOUND, 0.1),
)
SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": LENGTH}


def gpt() -> nn.Module:
    """The demo's decoder, small; returns its loss."""
    return GPT(2, 128, 4, LENGTH)


def gpt2() -> nn.Module:
    """GPT-2 with dropout."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 128}
    config = transformers.GPT2Config(n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    """BERT with masked-language-model head and dropout."""
    config = transformers.BertConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=4, intermediate_size=512, **SIZES
    )
    return transformers.BertForMaskedLM(config)


def llama() -> nn.Module:
    """Llama with grouped key and value heads."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=128, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=256, **SIZES,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches(make: Callable[[], nn.Module]) -> Iterator[Any]:
    """Batches of random tokens in the form the model takes."""
    generator = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
        yield (tokens, tokens) if make is gpt else {"input_ids": tokens, "labels": tokens}


def target_named(name: str) -> Target:
    """A shipped target; small models on the compute-bound one weigh formats as large ones do."""
    return compute_bound("h100") if name == COMPUTE_BOUND else Target.load(name)


def compute_bound(name: str, formats: Collection[str] = ()) -> Target:
    """A target without launch costs and with memory that is never waited for.

    Args:
        name: of the shipped target.
        formats: that it keeps; all of them if none are named.
    """
    known = Target.load(name)
    rates = {fmt: rate for fmt, rate in known.formats.items() if not formats or fmt in formats}
    fast = 100 * known.bandwidth
    return replace(
        known, launch_seconds=0.0, issue_seconds=0.0, bandwidth=fast, units=None, formats=rates
    )


def measure(make: Callable[[], nn.Module], target: str, budget: float | str) -> dict[str, Any]:
    """One row: plan on one batch, measure on it and on the next."""
    torch.manual_seed(0)
    model, source = make(), batches(make)
    planned, other = next(source), next(source)
    plan = precision_compiler.make_plan(model, planned, target=target_named(target), budget=budget)
    errors = []
    for batch in (planned, other):
        captured = capture(model, batch)
        _, exact = gradients_of(captured)
        _, found = gradients_of(captured, rewritten(captured.joint, plan))
        errors.append(relative_error(found, exact))
    formats = [choice.format for choice in plan.sites.values() if choice.kind == "contraction"]
    return {
        "model": make.__name__,
        "target": target,
        "budget": budget,
        "predicted": plan.predicted_gradient_error,
        "measured": errors[0],
        "measured_other_batch": errors[1],
        "contractions": {name: formats.count(name) for name in sorted(set(formats))},
    }


def main() -> None:
    """Run every case, print a line for each, write them all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("predicted_error.json"))
    output = parser.parse_args().output
    rows = []
    for make in (gpt, gpt2, bert, llama):
        for target, budget in CASES:
            row = measure(make, target, budget)
            rows.append(row)
            print({key: f"{v:.2e}" if isinstance(v, float) else v for key, v in row.items()})
    measured = ("measured", "measured_other_batch")
    ratios = [row[key] / row["predicted"] for row in rows for key in measured]
    spread = math.exp(max(abs(math.log(ratio)) for ratio in ratios))
    machine = {"cpu": measured_machine().description, "torch": torch.__version__}
    record = {
        "machine": machine, "date": datetime.date.today().isoformat(), "rows": rows,
        "largest_ratio": spread,
    }  # fmt: skip
    output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"measured and predicted differ by at most {spread:.2f}x; wrote {output}")


if __name__ == "__main__":
    main()
