"""What reductions do with their terms, told by what they compute and not by their names."""

import pytest

from precision_compiler.reductions import adds_up, selects
from tests.helpers import graph

SIZE, ROWS = 64, 8
SUMS = ["sum x", "sum.dim_IntList x [1]", "mean.dim x [0]", "nansum x"]
SELECTIONS = ["amax x [1]", "amin x [0]", "max x", "min x"]
OTHERS = ["prod.dim_int x 1", "logsumexp x [1]", "linalg_vector_norm x", "argmax x", "exp x"]


@pytest.mark.parametrize("operation", [*SUMS, *SELECTIONS, *OTHERS])
@pytest.mark.parametrize("shape", [(ROWS, SIZE), (2, 2)])
def test_reductions_are_told_by_their_derivatives(operation: str, shape: tuple[int, int]) -> None:
    module = graph(f"x:f32[{shape[0]},{shape[1]}] | a = {operation} | return a")
    node = next(node for node in module.graph.nodes if node.name == "a")
    assert adds_up(node) == (operation in SUMS)
    assert selects(node) == (operation in SELECTIONS)
