"""The solver against every assignment, and its time, gap and memory by the size of the model.

Graphs are captured on the meta device. Their errors are those of the formats alone, which makes
all layers equal ("equal"), or drawn at random for every tensor ("scattered"), as calibration
would make them: then no two layers are. Each case runs in a process of its own, for its peak
memory; cases that the output file has are left out, so that a run can be stopped and continued.
Run from the root of a checkout: python -m benchmarks.solver -o solver.json
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hypothesis import HealthCheck, Phase, given, settings
from torch import nn

from benchmarks.llama import SHAPES, Llama
from precision_compiler.budget import Budget
from precision_compiler.capture import capture
from precision_compiler.composed import Composed
from precision_compiler.files import write_atomically
from precision_compiler.journal import Journal
from precision_compiler.passes import JUDGE
from precision_compiler.passes.analyse.borrow_statistics import BorrowStatistics
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.problem import Problem
from precision_compiler.solver import solve
from precision_compiler.statistics import METRICS, Sensitivity, Statistics
from precision_compiler.target import Target
from tests.passes.assign.test_choose_formats import fitting, trusted
from tests.random_problems import legal_assignments, plain_seconds, problems

GAP = 1e-3
LENGTH = 1024
PARTS = (1.0, 0.3)
"""Budgets, times the error of torch.autocast."""


@dataclass(frozen=True)
class Case:
    """One model size: a published shape, or GPT-2 small, with a number of layers."""

    shape: str
    layers: int

    @property
    def name(self) -> str:
        """As in the output file."""
        return f"{self.shape} {self.layers} layers"


QUICK = (Case("gpt2", 12), Case("8b", 2), Case("8b", 4), Case("8b", 8))
CASES = (*QUICK, Case("8b", 32), Case("70b", 80), Case("405b", 126))


def model_of(case: Case) -> tuple[nn.Module, Any]:
    """The model on the meta device and a batch for it."""
    with torch.device("meta"):
        if case.shape == "gpt2":
            config = transformers.GPT2Config(n_layer=case.layers)
            tokens = torch.randint(config.vocab_size, (1, LENGTH))
            model: nn.Module = transformers.GPT2LMHeadModel(config)
            return model, {"input_ids": tokens, "labels": tokens}
        shape = replace(SHAPES[case.shape], layers=case.layers)
        return Llama(shape, LENGTH), torch.randint(shape.vocabulary, (1, LENGTH + 1))


def posed(case: Case) -> Unit:
    """The decision problem of a case, priced for the H100."""
    captured = capture(*model_of(case), None)
    unit = Unit(captured.joint, Target.load("h100"), Budget.parse("autocast"), Journal(), captured)
    Pipeline((BorrowStatistics(), *JUDGE[:-1])).run(unit)
    return unit


def scattered(problem: Problem, seed: int = 0) -> Problem:
    """The same problem with an error of its own for every tensor, log-normal over two decades."""
    rng = np.random.default_rng(seed)

    def drawn() -> Sensitivity:
        weight = np.zeros((len(METRICS), 255))
        size = np.exp(1.5 * rng.normal()) / len(problem.links.stores)
        weight[:, 120:130] = size * rng.dirichlet(np.ones(10))
        return Sensitivity(weight, 1.5)

    reads = problem.links.reads
    operands = {(link.contraction, link.argument): drawn() for link in reads}
    statistics = Statistics({name: drawn() for name in problem.links.stores}, operands, {})
    return Problem(problem.links, problem.options, problem.prices, statistics)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call returns, its CPU and wall seconds and the process's peak memory after it."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    return found, {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def measured(case: Case) -> dict[str, Any]:
    """Every figure of one case."""
    unit, capturing = timed(lambda: posed(case))
    problems = {"equal": unit.problem, "scattered": scattered(unit.problem)}
    row: dict[str, Any] = asdict(case) | {
        "nodes": len(unit.joint.module.graph.nodes),
        "contractions": len(unit.links.contractions),
        "stores": len(unit.links.stores),
        "capture": capturing,
    }
    for kind, problem in problems.items():
        autocast = problem.error(unit.baseline)
        row[f"{kind} kinds of part"] = len(Composed(problem).curves)
        for part in PARTS:
            budget = part * autocast
            solution, cost = timed(lambda p=problem, b=budget: solve(p, b, GAP))
            speedup = problem.seconds(unit.baseline) / solution.seconds
            row[f"{kind}, budget {part:g} of autocast"] = cost | {
                "gap": solution.gap,
                "within_budget": solution.error <= budget * (1 + 1e-9),
                "times_as_fast_as_autocast": speedup,
            }
    return row


def exactness(count: int) -> dict[str, Any]:
    """How many random problems the solver solves as listing every assignment does."""
    seen = {"problems": 0, "equal_to_brute_force": 0, "bound_above_the_optimum": 0}

    @settings(
        max_examples=count, deadline=None, derandomize=True, phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck), database=None,
    )  # fmt: skip
    @given(problems())
    def compare(problem: Problem) -> None:
        budget = fitting(problem, 1 / 3)
        best = min(
            plain_seconds(problem, each)
            for each in legal_assignments(problem)
            if problem.error(each) <= budget and trusted(problem, each, budget)
        )
        found, composed = solve(problem, budget, GAP), Composed(problem).solve(budget**2, GAP)
        bounds = [each.bound for each in (found, composed) if each is not None]
        seen["problems"] += 1
        seen["equal_to_brute_force"] += found.seconds <= best * (1 + GAP) + 1e-10
        seen["bound_above_the_optimum"] += max(bounds) > best * (1 + 1e-6) + 1e-12

    compare()
    return seen


def machine() -> dict[str, Any]:
    """Where and when."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def main() -> None:
    """Run every case that the output file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path("solver.json"))
    parser.add_argument("--quick", action="store_true", help="small models, fewer problems")
    parser.add_argument("--case", nargs=2, metavar=("SHAPE", "LAYERS"), help="print one case")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(Case(options.case[0], int(options.case[1])))))
        return
    path: Path = options.output
    rows = json.loads(path.read_text()) if path.is_file() else {"machine": machine()}
    if "exactness" not in rows:
        rows["exactness"] = exactness(100 if options.quick else 1000)
        write_atomically(path, json.dumps(rows, indent=1) + "\n")
    for case in QUICK if options.quick else CASES:
        if case.name not in rows:
            command = [sys.executable, "-m", "benchmarks.solver", "--case"]
            run = subprocess.run(
                [*command, case.shape, str(case.layers)], stdout=subprocess.PIPE, check=True
            )
            rows[case.name] = json.loads(run.stdout.splitlines()[-1])
            write_atomically(path, json.dumps(rows, indent=1) + "\n")
        print(case.name, json.dumps(rows[case.name], indent=1))


if __name__ == "__main__":
    main()
