"""Block formats in plans: rounded along the sum, predicted as measured, where they fit."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from precision_compiler import export_onnx
from precision_compiler.budget import Budget
from precision_compiler.compiler import Decision, decide
from precision_compiler.emulation import QUANTISE
from precision_compiler.export import read_plan
from precision_compiler.formats import CHOICES, choice_named, quantised
from precision_compiler.hadamard import hadamard, inverse_hadamard
from precision_compiler.passes.lower.emulate_formats import EmulateFormats
from precision_compiler.plan import Plan
from precision_compiler.scaled import ROTATION, rounded
from precision_compiler.scaling import SCALED_FORMATS
from precision_compiler.target import Target
from precision_compiler.verification import Truth
from tests.helpers import graph, rewrite
from tests.models import captured, made
from tests.random_graphs import inputs_of

BLOCKS = tuple(name for name, fmt in CHOICES.items() if fmt.by_axis)
EVERYTHING = EmulateFormats(everything=True)


@cache
def decided(model: str) -> Decision:
    """On a B200 whose memory and launches cost nothing, so that only arithmetic counts."""
    known = Target.load("b200")
    fast = replace(known, launch_seconds=0.0, issue_seconds=0.0, bandwidth=1e16, units=None)
    return decide(captured(model), fast, Budget.parse(0.2))


def exactly(x: torch.Tensor, name: str, axis: int) -> torch.Tensor:
    row = SCALED_FORMATS[name]
    turned = hadamard(x, axis, seed=ROTATION) if row.rotated else x
    made = rounded(turned, row.element, row.scaling, axis)
    return inverse_hadamard(made, axis, seed=ROTATION) if row.rotated else made


@pytest.mark.parametrize("name", BLOCKS)
def test_operands_are_rounded_in_blocks_along_the_sum(name: str) -> None:
    described = "x:f32[8,64] w:f32[64,16] | a = mm x w | return a"
    module = rewrite(graph(described), {"a": name}, EVERYTHING).joint.module
    x, w = inputs_of(module)
    (found,) = module(x, w)
    assert torch.equal(found, exactly(x, name, -1) @ exactly(w, name, -2))
    assert not torch.equal(found, x @ w)


def test_readers_that_sum_alike_share_a_copy_and_others_do_not() -> None:
    described = (
        "x:f32[64,64] w:f32[64,64] | t = t x | a = mm x w | b = mm x w | c = mm t w | return a b c"
    )
    formats = dict.fromkeys("abc", "mxfp8")
    module = rewrite(graph(described), formats, EVERYTHING).joint.module
    copies = [node for node in module.graph.nodes if node.target is QUANTISE]
    read = sorted((str(node.args[0]), node.args[2]) for node in copies)
    assert read == [("t", -1), ("w", -2), ("x", -1)]


@pytest.mark.parametrize("name", BLOCKS)
def test_quantised_takes_the_block_formats_scaling(name: str) -> None:
    x = torch.randn(5, 96) * torch.logspace(-3, 3, 96)
    for axis in (-1, 0) if not SCALED_FORMATS[name].rotated else (-1,):
        assert torch.equal(quantised(x, choice_named(name), axis=axis), exactly(x, name, axis))
    assert CHOICES[name].bytes == SCALED_FORMATS[name].bytes


@pytest.mark.parametrize("name", [name for name in BLOCKS if name in Target.load("b200").choices])
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_predicted_error_of_a_block_format_is_the_measured_one(model: str, name: str) -> None:
    decision = decided(model)
    problem, statistics = decision.unit.problem, decision.unit.statistics
    assert statistics is not None
    vetoes = decision.unit.vetoes
    sites = [
        site  # a format that only lacks a kernel, or is biased, has an error all the same
        for site in problem.links.contractions
        if vetoes.get((site, name), "bias").startswith(("bias", "support: no kernel"))
    ]
    roles = SCALED_FORMATS[name].roles or ("fprop", "dgrad", "wgrad")
    assert len(sites) > len(problem.links.contractions) * len(roles) / 9
    assert {problem.links.contractions[site].role for site in sites} <= set(roles)
    chosen = problem.uniform() | dict.fromkeys(sites, name)
    zero = [tensor.name for tensor in statistics.tensors if tensor.is_zero]
    measured = Truth(decision.captured, zero).measure(chosen, problem.error(chosen), 0.0)
    assert 0.8 < measured.ratio < 1.25
    assert measured.gradient_error > 0.01


def test_wider_elements_err_less_and_the_solver_knows() -> None:
    problem = decided("gpt").unit.problem
    site = "blocks.0.fc.fprop"
    alone = {
        name: problem.error(problem.uniform() | {site: name})
        for name in ("bf16", "mxfp8", "mxfp4", "nvfp4")
    }
    assert alone["bf16"] < alone["mxfp8"] < alone["nvfp4"] < alone["mxfp4"]


def test_a_plan_with_blocks_is_a_file_and_leaves_as_onnx(tmp_path: Path) -> None:
    plan = decided("gpt").plan()
    assert {choice.format for choice in plan.sites.values()} & set(BLOCKS)
    assert Plan.from_json(plan.to_json()) == plan
    case = made("gpt")
    report = export_onnx(case.model, case.batch, plan, tmp_path / "model.onnx")
    assert report.evaluator == "onnx.reference"  # onnxruntime has no kernels for block scales
    assert read_plan(tmp_path / "model.onnx") == plan
