"""One narrow format in an ONNX file instead of two, where it costs nothing."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import onnx
import pytest
import torch

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured
from precision_compiler.importing import import_graph, joint_of
from precision_compiler.journal import Journal
from precision_compiler.origin import origin_of
from precision_compiler.passes import JUDGE
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.passes.assign.unify_formats import UnifyFormats
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.problem import judged
from precision_compiler.target import Target
from tests.models import captured
from tests.onnx_files import Block, export, loaded


def unit_of(found: Captured, budget: float) -> Unit:
    """Everything up to the solver's own choice."""
    known = Target.load("h100")
    formats = {name: known.formats[name] for name in ("fp32", "bf16", "fp16")}
    unit = Unit(
        found.joint, replace(known, formats=formats), Budget.parse(budget), Journal(), found
    )
    assert JUDGE[-1] == UnifyFormats()
    Pipeline((MeasureSensitivity(), *JUDGE[:-1])).run(unit)
    return unit


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    torch.manual_seed(0)
    x = torch.randn(4, 16, 32)
    path = export(Block(32), (x,), ["x"], tmp_path_factory.mktemp("block") / "block.onnx")
    joint = joint_of(import_graph(loaded(onnx.load(path)), {"x": x}))
    return Captured(joint, lambda _: torch.zeros(()), "outputs")


def choose(unit: Unit, assignment: Mapping[str, str]) -> None:
    unit.solution = judged(unit.problem, dict(assignment), 0.0)
    unit.assignment = dict(assignment)


def mixed(unit: Unit) -> dict[str, str]:
    """Every other contraction, with its results, in the other narrow format."""
    chosen = unit.problem.uniform()
    for index, (name, stores) in enumerate(unit.links.results.items()):
        for site in (name, *stores):
            chosen[site] = ("fp16", "bf16", "fp16")[index % 3]
    return chosen


def test_two_formats_of_one_price_become_the_commoner(block: Captured) -> None:
    unit = unit_of(block, 0.1)
    choose(unit, mixed(unit))
    before = unit.problem.seconds(unit.assignment)
    assert not UnifyFormats().run(unit)
    narrow = Counter(fmt for fmt in unit.assignment.values() if fmt != "fp32")
    assert set(narrow) == {"fp16"}
    assert unit.solution is not None
    assert unit.problem.seconds(unit.assignment) <= before
    assert unit.problem.error(unit.assignment) <= 0.1
    assert unit.solution.assignment == unit.assignment


def test_constants_join_as_far_as_the_budget_reaches(block: Captured) -> None:
    nodes = {node.name: origin_of(node) for node in block.joint.module.graph.nodes}
    constants = [
        site.name
        for site in block.joint.sites
        if site.kind == "storage" and (tag := nodes[site.node]) is not None and not tag.node
    ]
    assert constants
    joined = {}
    for slack in (1.0, 1.1, 10.0):
        unit = unit_of(block, 0.1)
        moved = {name: "fp16" if fmt == "bf16" else fmt for name, fmt in mixed(unit).items()}
        choose(unit, moved)
        unit.budget = replace(unit.budget, limit=unit.problem.error(moved) * slack)
        UnifyFormats().run(unit)
        joined[slack] = {name for name in constants if unit.assignment[name] == "fp16"}
        assert unit.problem.error(unit.assignment) <= unit.budget.limit * (1 + 1e-9)
    assert joined[1.0] < joined[10.0]
    assert joined[1.0] <= joined[1.1] <= joined[10.0]


def test_a_format_that_errs_too_much_is_not_joined(block: Captured) -> None:
    unit = unit_of(block, 0.1)
    chosen = {  # the commoner format is the coarser one
        name: {"fp16": "bf16", "bf16": "fp16"}.get(fmt, fmt) for name, fmt in mixed(unit).items()
    }
    choose(unit, chosen)
    unit.budget = replace(unit.budget, limit=unit.problem.error(chosen))
    UnifyFormats().run(unit)
    assert set(unit.assignment.values()) == {"fp32", "fp16"}


def test_graphs_of_torch_stay_as_they_are() -> None:
    unit = unit_of(captured("mlp"), 0.1)
    before = dict(unit.assignment)
    UnifyFormats().run(unit)
    assert unit.assignment == before
