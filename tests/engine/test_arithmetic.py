"""Arithmetic of fused operations, with times that are given."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from precision_compiler.arithmetic import arithmetic_seconds
from precision_compiler.measure import Machine, Traffic
from tests.helpers import graph

PER_ELEMENT = {"neg": 1.0, "add": 2.0, "addcmul": 4.0, "exp": 11.0, "mul": 2.5, "sum": 3.0}
FEW, MANY = 1 << 13, 1 << 16


class Told(Machine):
    """A machine whose operations take what PER_ELEMENT says, and a lot to start."""

    def seconds(self, cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        found = {}
        for key, run in cases.items():
            name = next(name for name in sorted(PER_ELEMENT, key=len)[::-1] if name in key)
            size = int(key.rpartition(" x ")[2])
            result = run()
            assert isinstance(result, torch.Tensor)
            assert name == "sum" or result.numel() == size  # it really runs on so many elements
            found[key] = 1e6 + PER_ELEMENT[name] * size
        return found


TOLD = Told("a test", 1, {}, Traffic((1.0,), (1.0,), (1.0,)), 1.0, Path("unused"))


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ("x:f32[32,32] | a = neg x | return a", 0.0),
        ("x:f32[32,32] | a = exp x | return a", 10.0 * 1024),  # beyond reading one operand
        ("x:f32[32,32] y:f32[32,32] | a = mul x y | return a", 0.5 * 1024),  # and beyond two
        ("x:f32[32,32] | a = exp x | b = exp a | return b", 20.0 * 1024),
        ("x:f32[32,32] | a = sum x | return a", 2.0 * 1024),  # of what it reduces
    ],
)
def test_only_what_an_operation_takes_beyond_moving_its_operands_counts(
    described: str, expected: float
) -> None:
    nodes = [node for node in graph(described).graph.nodes if node.op == "call_function"]
    assert arithmetic_seconds(nodes, TOLD) == pytest.approx(expected)


def test_an_operation_that_two_kernels_compute_counts_twice() -> None:
    described = "x:f32[32,32] | a = exp x | return a"
    nodes = [node for node in graph(described).graph.nodes if node.op == "call_function"]
    assert arithmetic_seconds(nodes * 2, TOLD) == pytest.approx(20.0 * 1024)
