"""The runner: order, bookkeeping, and what it says when a pass goes wrong."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from precision_compiler.errors import BudgetError, InternalError, OrderError, VerifyError
from precision_compiler.graph import aten
from precision_compiler.passes import DECIDE, DEFAULT, REWRITE
from precision_compiler.pipeline import Numerics, Pass, Pipeline, Unit
from precision_compiler.problem import Solution
from precision_compiler.statistics import Statistics
from tests.helpers import graph, joint_of, machine, text, unit_of

TEXT = "x:f32[32,32] | a = relu x | b = mm a a | return b"


@dataclass(frozen=True)
class Step:
    """Do something to the unit. And say so.

    Not this line.
    """

    action: Callable[[Unit], bool]
    name: ClassVar[str] = "step"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        return self.action(unit)


def step(reads: str = "", makes: str = "", spoils: str = "") -> Pass:
    """A pass that does nothing, with kinds of fact as words."""

    class Facts(Step):
        """A pass of facts alone."""

    Facts.reads, Facts.makes, Facts.spoils = (
        frozenset(words.split()) for words in (reads, makes, spoils)
    )
    return Facts(lambda unit: False)


def test_pass_before_its_facts_is_an_order_error_at_construction() -> None:
    with pytest.raises(OrderError, match=r"step reads \['b'\], which no earlier pass makes"):
        Pipeline([step(makes="a"), step(reads="a b"), step(makes="b")])


def test_spoiled_facts_are_gone_until_made_again() -> None:
    with pytest.raises(OrderError):
        Pipeline([step(makes="a"), step(spoils="a"), step(reads="a")])
    Pipeline([step(makes="a"), step(spoils="a"), step(makes="a"), step(reads="a")])
    Pipeline([step(makes="a"), step(reads="a", makes="a", spoils="a"), step(reads="a")])


def test_given_facts_count_as_made() -> None:
    Pipeline([step(reads="a")], given=frozenset({"a"}))


def test_shipped_order_is_sound_and_no_pass_can_come_first_that_reads() -> None:
    Pipeline(DEFAULT)
    Pipeline(DECIDE)
    Pipeline(REWRITE, given=frozenset({"assignment"}))
    with pytest.raises(OrderError):
        Pipeline(REWRITE)
    for index, one in enumerate(DEFAULT):
        if one.reads:
            with pytest.raises(OrderError):
                Pipeline((one, *DEFAULT[:index], *DEFAULT[index + 1 :]))


def test_journal_has_one_line_per_pass_with_its_first_line_and_counts() -> None:
    def add_node(unit: Unit) -> bool:
        nodes = unit.joint.module.graph
        output = nodes.output_node()
        with nodes.inserting_before(output):
            first = output.args[0]
            assert isinstance(first, tuple)
            made = nodes.call_function(aten.neg.default, (first[0],))
        made.meta["val"] = made.args[0].meta["val"]  # type: ignore[union-attr]
        output.args = ((made,),)
        return True

    unit = unit_of(graph(TEXT))
    said: list[str] = []
    Pipeline([Step(add_node), Step(lambda unit: False)]).run(unit, said.append)
    assert [entry.step for entry in unit.journal.entries] == ["step", "step"]
    assert [entry.message for entry in unit.journal.entries] == said
    assert said == ["Do something to the unit. And say so"] * 2
    counts = [(entry.nodes_before, entry.nodes_after) for entry in unit.journal.entries]
    assert counts == [(4, 5), (5, 5)]
    assert all(entry.seconds > 0 for entry in unit.journal.entries)


def test_after_a_change_dead_nodes_are_gone_and_the_module_runs() -> None:
    def bypass(unit: Unit) -> bool:
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        nodes["b"].replace_input_with(nodes["a"], nodes["x"])
        return True

    unit = unit_of(graph(TEXT))
    Pipeline([Step(bypass)]).run(unit)
    assert text(unit.joint.module) == "x:f32[32,32] | b = mm x x | return b"
    value = torch.randn(32, 32)
    assert torch.equal(unit.joint.module(value)[0], value @ value)


def test_illegal_graph_after_a_pass_names_the_pass() -> None:
    def narrow(unit: Unit) -> bool:
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        nodes["b"].meta["val"] = nodes["b"].meta["val"].bfloat16()
        return True

    with pytest.raises(VerifyError, match=r"after step, result 0 is torch\.bfloat16"):
        Pipeline([Step(narrow)]).run(unit_of(graph(TEXT)))


@pytest.mark.parametrize("kind", [BudgetError, InternalError])
def test_error_in_a_pass_carries_its_name_as_a_note(kind: type[Exception]) -> None:
    def fail(unit: Unit) -> bool:
        raise kind("it broke")

    with pytest.raises(kind, match="it broke") as caught:
        Pipeline([Step(fail)]).run(unit_of(graph(TEXT)))
    assert caught.value.__notes__ == ["in pass step"]


def test_formats_of_a_kind_follow_the_target() -> None:
    unit = unit_of(graph(TEXT), target=machine())
    assert unit.formats_for("contraction") == ("fp32", "tf32", "bf16", "fp16", "e4m3")
    assert unit.formats_for("storage") == ("fp32", "bf16", "fp16")


def test_target_and_problem_asked_for_too_early_are_our_bugs() -> None:
    with pytest.raises(InternalError, match="asks for the target"):
        _ = unit_of(graph(TEXT)).target
    with pytest.raises(InternalError, match="before the statistics"):
        _ = unit_of(graph(TEXT), target=machine()).problem


def test_a_unit_to_rewrite_has_all_findings_and_a_graph_and_journal_of_its_own() -> None:
    unit = unit_of(graph(TEXT), {})
    unit.machine = replace(machine(), compute_capability="9.0", device="cuda")
    unit.statistics = Statistics({}, {}, {})
    unit.joint = joint_of(graph("x:f32[32,32] | a = relu x | return a"))  # no sites to measure
    unit.journal.note("analyse", "something was found")
    solution = Solution({"site": "bf16"}, 1.0, 0.1, 1.0, 0.0)
    before = dict(unit.assignment)
    links, problem, nodes = unit.links, unit.problem, len(unit.joint.module.graph.nodes)
    twin = unit.to_rewrite(unit.joint.copy(), solution)
    assert (twin.assignment, twin.solution) == ({"site": "bf16"}, solution)
    assert twin.architecture == "sm_90"
    assert (unit.assignment, unit.solution, unit.architecture) == (before, None, "")
    # They are of the graph as captured: after rewriting, nobody could work them out again.
    assert twin.links is links
    assert twin.problem is problem
    twin.joint.module.graph.erase_node(twin.joint.module.graph.output_node())
    twin.journal.note("rewrite", "something was done")
    twin.assignment["site"] = "fp16"
    assert len(unit.joint.module.graph.nodes) == nodes
    assert [entry.step for entry in unit.journal.entries] == ["analyse"]
    assert [entry.step for entry in twin.journal.entries] == ["analyse", "rewrite"]
    assert solution.assignment == {"site": "bf16"}
