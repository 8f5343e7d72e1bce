"""A mixed plan against every uniform recipe, on the model that published GEMM times are for.

Blocks of a 5B-parameter decoder (width 4096, MLP 16384, 32 heads, 31 x 512 tokens) on a B300.

1. Product by product, each with its own quantisation, as in the published table: the fastest
   recipe for every product against one recipe for all.
2. Whole plans from the meta device, where a copy serves all its readers and casts fuse. A uniform
   recipe gives all products of linear layers one format and chooses the rest as well as it can; the
   mixed plan chooses for each product. Plans scale e4m3 by the tensor's present amax ("fp8
   current"). Each mixed plan has a limit on the predicted error, and competes with the recipes
   whose error is within it. With copies shared NVFP4 is the fastest format of every product, so
   without a limit the mixed plan is that recipe.

Times are predictions; nothing has run on a B300.
Run: python benchmarks/mixed_recipes.py -o mixed_recipes.json
"""

import argparse
import datetime
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from precision_compiler.budget import Budget
from precision_compiler.capture import capture
from precision_compiler.compiler import decide
from precision_compiler.files import write_atomically
from precision_compiler.problem import Problem
from precision_compiler.solver import solve
from precision_compiler.target import Target

RECIPES = ("bf16", "e4m3", "mxfp8", "nvfp4")
WIDTH, HIDDEN, HEADS, BATCH, LENGTH = 4096, 16384, 32, 31, 512
UNLIMITED = 1e6
BUDGETS = (UNLIMITED, 0.4, 0.2, 0.15, 0.05)
PUBLISHED = {
    "bf16": ("bf16", "none"),
    "fp8 current": ("e4m3", "tensor"),
    "fp8 delayed": ("e4m3", "delayed"),
    "mxfp8": ("mxfp8", "block"),
    "nvfp4": ("nvfp4", "block"),
}
LAYERS = {
    "qkv": (WIDTH, 3 * WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, HIDDEN),
    "down": (HIDDEN, WIDTH),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return found


class Decoder(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def problem_of(layers: int, target: str) -> tuple[Problem, dict[str, str]]:
    """The decision problem in the recipes' formats; and autocast's policy."""
    known = Target.load(target).with_recipes()  # as published: scales and rounding of the formats
    wanted = {"fp32", "tf32", *RECIPES}
    formats = {name: rate for name, rate in known.formats.items() if name in wanted}
    with torch.device("meta"):
        captured = capture(Decoder(layers), torch.empty(BATCH, LENGTH, WIDTH))
    unit = decide(captured, replace(known, formats=formats), Budget.parse(UNLIMITED)).unit
    return unit.problem, unit.baseline


def linear_products(problem: Problem) -> list[str]:
    return [name for name, site in problem.links.contractions.items() if site.op in ("mm", "addmm")]


def fastest_uniform(recipes: Mapping[str, Any], budget: float) -> str:
    """The fastest of the recipes whose predicted error is within a budget."""
    within = [name for name in RECIPES if recipes[name]["error"] <= budget]
    return min(within, key=lambda name: recipes[name]["seconds"])


def plans(problem: Problem) -> dict[str, Any]:
    """Every uniform recipe, and mixed plans with limits on the error."""
    recipes = {name: row(uniform(problem, name), UNLIMITED) for name in RECIPES}
    rivals = dict(recipes)
    for budget in BUDGETS:
        label = "mixed" if budget == UNLIMITED else f"mixed, error {budget:g}"
        against = fastest_uniform(rivals, budget)
        recipes[label] = row(problem, budget) | {"budget": budget, "against": against}
    return recipes


def attention_out(found: Mapping[str, Any]) -> str:
    """The formats of attention's output projection, forward, dgrad and wgrad."""
    formats = {fmt for name, fmt in found["formats"].items() if ".out." in name}
    return ", ".join(sorted(formats))


def uniform(problem: Problem, fmt: str) -> Problem:
    """The problem with one format for all products of linear layers."""
    fixed = dict.fromkeys(linear_products(problem), (fmt,))
    return replace(problem, options={**problem.options, **fixed}, _cache={})


def row(problem: Problem, budget: float) -> dict[str, Any]:
    found = solve(problem, budget)
    formats = {name: found.assignment[name] for name in linear_products(problem)}
    return {"seconds": found.seconds, "error": found.error, "gap": found.gap, "formats": formats}


def alone(target: Target) -> dict[str, Any]:
    """Seconds of every product of a layer under every published recipe, quantisation included."""
    tokens = BATCH * LENGTH
    found = {}
    for layer, (inputs, outputs) in LAYERS.items():
        passes = {
            "fprop": (tokens, outputs, inputs),
            "dgrad": (tokens, inputs, outputs),
            "wgrad": (outputs, inputs, tokens),
        }
        for role, (m, n, k) in passes.items():
            found[f"{layer}.{role}"] = {
                recipe: target.gemm_seconds(m, n, k, format=fmt, scaling=scaling)
                for recipe, (fmt, scaling) in PUBLISHED.items()
            }
    totals = {recipe: sum(row[recipe] for row in found.values()) for recipe in PUBLISHED}
    return {
        "seconds": found,
        "uniform": totals,
        "mixed": sum(min(row.values()) for row in found.values()),
        "chosen": {name: min(row, key=lambda recipe: row[recipe]) for name, row in found.items()},
    }


def alone_table(found: Mapping[str, Any]) -> Table:
    made = Table(title="Products of one block, each quantised by itself, ms predicted")
    made.add_column("product")
    for recipe in PUBLISHED:
        made.add_column(recipe, justify="right")
    for name, row in found["seconds"].items():
        best = found["chosen"][name]
        cells = (f"{'*' if recipe == best else ''}{1e3 * row[recipe]:.3f}" for recipe in PUBLISHED)
        made.add_row(name, *cells)
    made.add_section()
    made.add_row("all", *(f"{1e3 * value:.3f}" for value in found["uniform"].values()))
    made.caption = f"the fastest for each (*): {1e3 * found['mixed']:.3f} ms"
    return made


def table(record: Mapping[str, Any]) -> Table:
    made = Table(title=f"{record['layers']} layers on {record['target']}, predicted")
    for heading in ("recipe", "ms", "error (prior)", "of bf16", "attention out", "against"):
        made.add_column(heading)
    slowest = record["recipes"]["bf16"]["seconds"]
    for name, found in record["recipes"].items():
        speed = f"{slowest / found['seconds']:.2f}x"
        against = ""
        if "against" in found:
            rival = record["recipes"][found["against"]]["seconds"]
            against = f"{found['against']}: {found['seconds'] / rival - 1:+.1%}"
        made.add_row(
            name, f"{1e3 * found['seconds']:.2f}", f"{found['error']:.3f}", speed,
            attention_out(found), against,
        )  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("mixed_recipes.json"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--target", default="b300")
    options = parser.parse_args()
    problem, _ = problem_of(options.layers, options.target)
    record = {
        "target": options.target,
        "layers": options.layers,
        "torch": torch.__version__,
        "date": str(datetime.date.today()),
        "products": alone(Target.load(options.target)),
        "recipes": plans(problem),
    }
    write_atomically(options.output, json.dumps(record, indent=1))
    console = Console()
    console.print(alone_table(record["products"]))
    console.print(table(record))
    formats = Counter(record["recipes"]["mixed, error 0.2"]["formats"].values())
    console.print("the mixed plan with error 0.2 has", dict(formats))


if __name__ == "__main__":
    main()
