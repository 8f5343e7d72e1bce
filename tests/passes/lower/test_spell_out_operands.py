"""Operands become plain operations with the very same bits."""

import operator

import pytest
import torch

from precision_compiler.graph import CONVERT
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.passes.lower.lower_contractions import LowerContractions
from precision_compiler.passes.lower.spell_out_operands import SpellOutOperands
from precision_compiler.pipeline import Pipeline, Unit
from tests import lowered_run
from tests.helpers import graph, unit_of
from tests.random_graphs import inputs_of

DESCRIBED = "x:f32[32,64] w:f32[64,40] | a = mm x w | b = neg a | return a b"
GIVEN = frozenset({"assignment"})


def lowered(fmt: str) -> Unit:
    unit = unit_of(graph(DESCRIBED), {"a": fmt})
    unit.joint, unit.architecture = on_gpu(unit.joint), "sm_100"
    Pipeline((LowerContractions(),), given=GIVEN).run(unit)
    return unit


@pytest.mark.parametrize("fmt", ["e4m3", "mxfp8", "mxfp4", "nvfp4"])
def test_every_call_becomes_plain_operations_with_the_same_bits(fmt: str) -> None:
    inputs = inputs_of(graph(DESCRIBED))
    unit = lowered(fmt)
    before = lowered_run.results(unit.joint.module, inputs)
    Pipeline((SpellOutOperands(),), given=GIVEN).run(unit)
    after = lowered_run.results(unit.joint.module, inputs)
    assert all(map(torch.equal, before, after))
    calls = [node for node in unit.joint.module.graph.nodes if node.op == "call_function"]
    for node in calls:
        assert node.target in (CONVERT, operator.getitem) or str(node.target).startswith("aten.")


def test_operations_belong_to_where_the_tensor_is_made() -> None:
    described = (
        "x:f32[32,64] w:f32[64,48] g:f32[32,48] | y = neg x | a = mm y w"
        " | t = t y | c@backward = mm t g | return a c"
    )
    unit = unit_of(graph(described), {"a": "e4m3", "c": "e4m3"})
    unit.joint, unit.architecture = on_gpu(unit.joint), "sm_90"
    Pipeline((LowerContractions(), SpellOutOperands()), given=GIVEN).run(unit)
    casts = unit.joint.module.graph.find_nodes(op="call_function", target=CONVERT)
    narrow = [node for node in casts if node.args[1] == torch.float8_e4m3fn]
    assert len(narrow) == 4
    assert {node.meta["partitioner_tag"] for node in narrow if "partitioner_tag" in node.meta} <= {
        "is_forward"
    }  # kept for the backward pass in 8 bits, not made again there


def test_a_graph_without_operands_is_left_alone() -> None:
    unit = unit_of(graph(DESCRIBED))
    assert not SpellOutOperands().run(unit)
