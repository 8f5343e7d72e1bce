"""What holds for each pass of the shipped list, whatever it does."""

import dataclasses
import importlib
import itertools
import re
import warnings
from pathlib import Path

import pytest
import torch

import precision_compiler.passes as shipped
from precision_compiler.budget import Budget
from precision_compiler.graph import copied
from precision_compiler.journal import Journal
from precision_compiler.links import find_links
from precision_compiler.passes import BORROW, CHOOSE, DECIDE, DEFAULT, EMULATE, REWRITE
from precision_compiler.pipeline import Numerics, Pass, Pipeline, Unit
from precision_compiler.problem import fixes_result
from precision_compiler.replay import gradients_of
from tests.helpers import machine
from tests.models import MODELS, captured, planned

EVERY = (*DEFAULT, BORROW[0])
each = pytest.mark.parametrize("step", EVERY, ids=[step.name for step in EVERY])
CARRY_OUT = (*REWRITE, *EMULATE)
each_rewrite = pytest.mark.parametrize(
    "step", CARRY_OUT, ids=[step.name + " everything" * (step in EMULATE) for step in CARRY_OUT]
)
models = pytest.mark.parametrize("model", ["mlp", "gpt", "llama", "vit"])


@each
def test_name_is_that_of_file_and_class(step: Pass) -> None:
    assert re.fullmatch(r"[a-z]+(-[a-z]+)+", step.name)
    module = type(step).__module__
    assert module.rpartition(".")[2] == step.name.replace("-", "_")
    assert type(step).__name__ == step.name.title().replace("-", "")
    assert module.startswith("precision_compiler.passes.")
    assert importlib.import_module(module).__doc__ == f"See {type(step).__name__}."


@each
def test_test_file_has_the_same_name(step: Pass) -> None:
    stage, name = type(step).__module__.split(".")[-2:]
    assert (Path(__file__).parent / "passes" / stage / f"test_{name}.py").is_file()


def test_lists_for_parts_of_the_way_hold_the_same_passes() -> None:
    """CHOOSE is the last step of deciding; EMULATE a lowering that takes the place of REWRITE."""
    assert DECIDE[-len(CHOOSE) :] == CHOOSE
    assert BORROW[1:] == DECIDE[1:]
    for part in (CHOOSE, EMULATE, REWRITE, DECIDE):
        assert {step.name for step in part} <= {step.name for step in DEFAULT}
    for part, given in (
        (DECIDE, ()),
        (BORROW, ()),
        (REWRITE, ["assignment"]),
        (EMULATE, ["assignment"]),
    ):
        Pipeline(part, frozenset(given))  # in an order in which each finds what it reads


def test_names_are_unique_and_the_list_is_complete() -> None:
    assert len({step.name for step in EVERY}) == len(EVERY)
    assert (*DECIDE, *REWRITE) == DEFAULT
    folder = Path(str(shipped.__file__)).parent
    files = {path.stem for path in folder.glob("*/*.py") if path.stem != "__init__"}
    assert files == {step.name.replace("-", "_") for step in EVERY}


@each
def test_docstring_starts_with_a_sentence_for_the_report(step: Pass) -> None:
    first = str(type(step).__doc__).splitlines()[0]
    assert first.endswith(".")
    assert first[0].isupper()
    assert len(first) < 100


@each
def test_options_are_fields_of_a_frozen_dataclass(step: Pass) -> None:
    assert dataclasses.is_dataclass(step)
    assert type(step).__dataclass_params__.frozen
    assert type(step)() == step
    with pytest.raises(dataclasses.FrozenInstanceError):
        step.name = "another"
    assert isinstance(step.numerics, Numerics)


CYCLE = ("bf16", "fp32", "tf32", "fp16", "e4m3", "bf16", "e5m2")


def mixed(model: str) -> dict[str, str]:
    """Every format in turn, as far as results of contractions leave the choice."""
    links = find_links(captured(model).joint)
    chosen = dict(zip(links.contractions, itertools.cycle(CYCLE), strict=False))
    stores = dict(zip(links.stores, itertools.cycle(("fp32", "bf16", "fp16")), strict=False))
    for store, writer in links.writer.items():
        if fixes_result(chosen[writer]) and chosen[writer] != "fp32":
            stores[store] = chosen[writer]
    return chosen | stores


def unit_for(model: str) -> Unit:
    """A unit with a mixed assignment, to be rewritten."""
    joint = captured(model).joint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's, on copying its graphs
        return Unit(joint.copy(), None, Budget.parse(1.0), Journal(), assignment=mixed(model))


def rewritten_up_to(model: str, step: Pass) -> Unit:
    """The unit after all passes before ``step`` in its list."""
    unit = unit_for(model)
    steps = REWRITE if step in REWRITE else EMULATE
    earlier = steps[: steps.index(step)]
    Pipeline(earlier, given=frozenset({"assignment"})).run(unit)
    return unit


def run_alone(step: Pass, unit: Unit) -> None:
    Pipeline([step], given=step.reads).run(unit)


def code_of(unit: Unit) -> list[str]:
    return [
        f"{node.format_node()} {node.meta.get('partitioner_tag')}"
        for node in unit.joint.module.graph.nodes
    ]


@models
@each_rewrite
def test_rewriting_twice_is_rewriting_once(step: Pass, model: str) -> None:
    unit = rewritten_up_to(model, step)
    run_alone(step, unit)
    once = code_of(unit)
    assert not step.run(unit)
    assert code_of(unit) == once


@models
@each_rewrite
def test_rewriting_is_deterministic(step: Pass, model: str) -> None:
    units = [rewritten_up_to(model, step) for _ in range(2)]
    for unit in units:
        run_alone(step, unit)
    assert code_of(units[0]) == code_of(units[1])


@models
@pytest.mark.parametrize(
    "step", [one for one in REWRITE if one.numerics is Numerics.EXACT], ids=lambda one: one.name
)
def test_exact_rewriting_changes_no_bit(step: Pass, model: str) -> None:
    unit = rewritten_up_to(model, step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        before = copied(unit.joint.module)
    run_alone(step, unit)
    one = gradients_of(captured(model), before)
    other = gradients_of(captured(model), unit.joint.module)
    assert torch.equal(one[0], other[0])
    for first, second in zip(one[1], other[1], strict=True):
        assert torch.equal(first, second)


@models
def test_exact_deciding_leaves_the_graph_alone(model: str) -> None:
    found = captured(model)
    unit = unit_for(model)
    unit.captured, unit.machine, unit.budget = found, machine(), Budget.parse("autocast")
    before = code_of(unit)
    Pipeline(DECIDE).run(unit)
    assert code_of(unit) == before
    assert all(step.numerics is Numerics.EXACT for step in DECIDE)
    seconds = planned(model).predicted_seconds  # ties may be decided either way
    assert unit.solution is not None
    assert unit.solution.seconds == pytest.approx(seconds, rel=3e-3)


@pytest.mark.parametrize("steps", [REWRITE, EMULATE], ids=["rewritten", "emulated"])
@pytest.mark.parametrize("model", MODELS)
def test_rewritten_graph_returns_what_the_model_returns(
    model: str, steps: tuple[Pass, ...]
) -> None:
    unit = unit_for(model)
    Pipeline(steps, given=frozenset({"assignment"})).run(unit)
    expected = gradients_of(captured(model))
    found = gradients_of(captured(model), unit.joint.module)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=0.05)
    for one, other in zip(found[1], expected[1], strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
