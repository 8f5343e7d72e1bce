"""Inductor's own kernels of the small models, and how near the expected ones come."""

from collections import Counter
from functools import cache
from math import prod

import pytest

from precision_compiler.fusion import Kernel, kernels_of
from precision_compiler.graph import contraction_rule, shape_of, value_of
from precision_compiler.passes.cost.find_kernels import expected_kernels
from tests.models import MODELS, captured


@cache
def real(name: str) -> tuple[Kernel, ...]:
    parts = captured(name).joint.parts
    return tuple(kernel for part in parts for kernel in kernels_of(part))


def traffic(name: str, kernels: tuple[Kernel, ...]) -> int:
    """Bytes that the generated kernels read and write."""
    nodes = {node.name: node for node in captured(name).joint.module.graph.nodes}
    total = 0
    for kernel in kernels:
        for tensor in (*kernel.reads, *kernel.writes) if kernel.generated else ():
            value = value_of(nodes[tensor]) if tensor in nodes else None
            if value is not None:
                total += prod(shape_of(nodes[tensor])) * value.element_size()
    return total


@pytest.mark.parametrize("name", MODELS)
def test_each_pass_is_lowered_and_every_contraction_is_a_library_call(name: str) -> None:
    kernels = real(name)
    assert {kernel.backward for kernel in kernels} == {False, True}
    graph = captured(name).joint.module.graph
    contractions = {node.name for node in graph.nodes if contraction_rule(node)}
    called = Counter(node for kernel in kernels if not kernel.generated for node in kernel.nodes)
    merged = sum(not kernel.generated and not kernel.nodes for kernel in kernels)
    missing = [node for node in contractions if node not in called]
    assert len(missing) <= max(merged, 1)  # a product and an addition can become one call


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_was_written_before_or_comes_from_outside(name: str) -> None:
    for backward in (False, True):
        written: set[str] = set()
        for kernel in real(name):
            if kernel.backward == backward:
                inside = {tensor for tensor in kernel.reads if tensor.startswith("buf")}
                assert inside <= written
                written |= set(kernel.writes)


@pytest.mark.parametrize("name", MODELS)
def test_expected_kernels_move_about_as_many_bytes(name: str) -> None:
    joint = captured(name).joint
    expected = tuple(expected_kernels(joint.module.graph, joint.saved))
    assert 0.5 < traffic(name, expected) / traffic(name, real(name)) < 1.25


def test_lowering_leaves_the_graph_as_it_is() -> None:
    part = captured("mlp").joint.parts[0]
    before = [(node.name, node.op) for node in part.module.graph.nodes]
    assert kernels_of(part) == kernels_of(part)
    assert [(node.name, node.op) for node in part.module.graph.nodes] == before
