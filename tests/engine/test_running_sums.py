"""Which reductions add up, told by what they compute and not by their names."""

import pytest
import torch

from precision_compiler.running_sums import one_way_terms
from tests.helpers import graph

SIZE, ROWS = 64, 8


def terms_of(operation: str, x: torch.Tensor) -> float | None:
    module = graph(f"x:f32[{ROWS},{SIZE}] | a = {operation} | return a")
    node = next(node for node in module.graph.nodes if node.name == "a")
    args = (x, *node.args[1:])
    total = node.target(*args, **node.kwargs)
    return one_way_terms(node, args, total)


@pytest.mark.parametrize(
    ("operation", "count"),
    [
        ("sum x", ROWS * SIZE),
        ("sum.dim_IntList x [1]", SIZE),
        ("mean.dim x [0]", ROWS),
        ("nansum x", ROWS * SIZE),
    ],
)
def test_sums_and_means_count_terms_of_one_sign(operation: str, count: int) -> None:
    assert terms_of(operation, torch.full((ROWS, SIZE), 0.5)) == pytest.approx(count)
    mixed = terms_of(operation, torch.randn(ROWS, SIZE))
    assert mixed is not None
    assert mixed < 0.3 * count


@pytest.mark.parametrize(
    "operation",
    [
        "amax x [1]",
        "prod.dim_int x 1",
        "logsumexp x [1]",
        "linalg_vector_norm x",
        "argmax x",
        "exp x",
    ],
)
def test_other_operations_add_nothing_up(operation: str) -> None:
    assert terms_of(operation, torch.rand(ROWS, SIZE) + 0.5) is None


def test_zeros_pull_no_way() -> None:
    assert terms_of("sum x", torch.zeros(ROWS, SIZE)) is None
