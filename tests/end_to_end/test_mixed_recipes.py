"""Whole plans on the model and machine that published GEMM times are for: 5B blocks on a B300."""

import pytest

from benchmarks.mixed_recipes import (
    BATCH,
    LAYERS,
    LENGTH,
    RECIPES,
    UNLIMITED,
    linear_products,
    problem_of,
    row,
    uniform,
)
from precision_compiler.problem import Problem
from precision_compiler.target import Target


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of(1, "b300")[0]


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.4])
def test_mixed_plan_beats_every_uniform_recipe_within_its_error(
    problem: Problem, budget: float
) -> None:
    found = row(problem, budget)
    recipes = {name: row(uniform(problem, name), UNLIMITED) for name in RECIPES}
    within = {name for name, recipe in recipes.items() if recipe["error"] <= budget}
    assert within == {"bf16", "e4m3", "mxfp8"}  # NVFP4 everywhere rounds too much
    assert found["error"] <= budget
    assert found["seconds"] < min(recipes[name]["seconds"] for name in within)
    assert len(set(found["formats"].values())) > 1


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.4, UNLIMITED])
def test_attention_out_is_not_given_the_format_that_is_slower_there(
    problem: Problem, budget: float
) -> None:
    """Published: forward .317 ms in FP8 with current scaling, .307 in bf16, .269 in MXFP8."""
    inputs, outputs = LAYERS["out"]
    alone = {
        fmt: Target.load("b300").gemm_seconds(
            BATCH * LENGTH, outputs, inputs, format=fmt, scaling=scaling
        )
        for fmt, scaling in (("bf16", "none"), ("e4m3", "tensor"), ("mxfp8", "block"),
                             ("nvfp4", "block"))
    }  # fmt: skip
    slowest = max(alone, key=lambda fmt: alone[fmt])
    assert slowest == "e4m3"
    formats = row(problem, budget)["formats"]
    chosen = {formats[name] for name in linear_products(problem) if ".out." in name}
    assert len(chosen) == 1
    assert slowest not in chosen
    assert alone[chosen.pop()] < alone["bf16"]


def test_without_a_limit_on_the_error_nvfp4_everywhere_is_the_fastest(problem: Problem) -> None:
    """Copies serve all products that read them, so quantising weighs less than when published."""
    assert set(row(problem, UNLIMITED)["formats"].values()) == {"nvfp4"}
