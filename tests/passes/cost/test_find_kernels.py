"""Expected kernels, by hand."""

import pytest

from precision_compiler.fusion import Kernel
from precision_compiler.passes.cost.find_kernels import FindKernels, expected_kernels
from tests.helpers import graph, machine, unit_of


def found(text: str, saved: frozenset[str] = frozenset()) -> list[Kernel]:
    return list(expected_kernels(graph(text).graph, saved))


def test_one_kernel_between_two_contractions() -> None:
    text = "x:f32[8,8] | a = mm x x | b = relu a | c = neg b | d = mm c x | return d"
    assert found(text) == [Kernel(("b", "c"), ("a",), ("c",), True, False)]


def test_a_tensor_read_behind_a_contraction_is_written_and_read_again() -> None:
    text = "x:f32[8,8] | a = relu x | b = mm a x | c = add b a | return c"
    assert found(text) == [
        Kernel(("a",), ("x",), ("a",), True, False),
        Kernel(("c",), ("b", "a"), ("c",), True, False),
    ]


def test_views_are_looked_through() -> None:
    text = "x:f32[8,8] | a = relu x | t = t a | b = mm t x | return b"
    assert found(text) == [Kernel(("a",), ("x",), ("a",), True, False)]


@pytest.mark.parametrize(
    ("saved", "reads", "writes"),
    [(frozenset({"b"}), ("b",), ("b",)), (frozenset({"x"}), ("x",), ())],
)
def test_what_is_not_saved_is_computed_again(
    saved: frozenset[str], reads: tuple[str, ...], writes: tuple[str, ...]
) -> None:
    text = "x:f32[8,8] | a = relu x | b = neg a | c@backward = exp b | return c"
    forward, backward = found(text, saved)
    assert backward == Kernel(("c",), reads, ("c",), True, True)
    assert forward.writes == writes


def test_results_of_the_graph_are_written() -> None:
    assert found("x:f32[8] | a = relu x | return a")[0].writes == ("a",)


def test_the_pass_says_how_it_knows() -> None:
    unit = unit_of(graph("x:f32[8,8] | a = relu x | b = mm a x | return b"), target=machine())
    assert not FindKernels().run(unit)
    assert len(unit.kernels) == 1
    assert unit.journal.entries[-1].message == "1 fused kernels, by contraction depths"
