"""What a few operations compute is told from their results, however they are spelt."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from precision_compiler.lowering.recognise import Activation, Norm, recognise

F = torch.nn.functional
SHAPE = (2, 5, 48)


def traced(function: Callable[..., Any], tensors: int, vectors: int) -> fx.Graph:
    """The graph of a function of tensors and vectors, decomposed as Inductor does."""
    with FakeTensorMode():
        given = [torch.empty(SHAPE) for _ in range(tensors)]
        given += [torch.empty(SHAPE[-1]) for _ in range(vectors)]
        module: fx.GraphModule = make_fx(function, decomposition_table=select_decomp_table())(
            *given
        )
        return module.graph


def made_by(function: Callable[..., Any], tensors: int, vectors: int) -> Norm | Activation | None:
    graph = traced(function, tensors, vectors)
    (result,) = graph.output_node().all_input_nodes
    return recognise(result)


Formulas = dict[str, Callable[..., Any]]
NORMS: Formulas = {
    "layer_norm": lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, 1e-6),
    "by hand": lambda x, w, b: b
    + w * ((x - x.mean(-1, True)) / (x.var(-1, False, keepdim=True) + 1e-6).sqrt()),
    "two reductions": lambda x, w, b: (x - x.mean(-1, True))
    * ((x - x.mean(-1, True)) ** 2).mean(-1, True).add(1e-6).rsqrt() * w + b,
}  # fmt: skip
ROOT_NORMS: Formulas = {
    "torch": lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-5),
    "llama": lambda x, w: w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)),
    "square": lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
    "division": lambda x, w: x * w / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt(),
}


@pytest.mark.parametrize("spelling", NORMS)
def test_layer_norm_is_recognised_however_spelt(spelling: str) -> None:
    found = made_by(NORMS[spelling], 1, 2)
    assert isinstance(found, Norm)
    assert (found.x.op, found.eps, found.centred) == ("placeholder", 1e-6, True)
    assert found.weight.name.startswith("w_")
    assert found.bias is not None
    assert found.bias.name.startswith("b_")


@pytest.mark.parametrize("spelling", ROOT_NORMS)
def test_root_mean_square_norm_is_recognised_however_spelt(spelling: str) -> None:
    found = made_by(ROOT_NORMS[spelling], 1, 1)
    assert isinstance(found, Norm)
    assert (found.x.op, found.centred, found.bias) == ("placeholder", False, None)
    assert found.eps == pytest.approx(1e-5)  # torch's own rounds it to float32


def test_activations_are_recognised() -> None:
    found = made_by(lambda x: F.gelu(x), 1, 0)
    assert isinstance(found, Activation)
    assert found.up is None
    for gated in (lambda g, u: F.silu(g) * u, lambda g, u: u * (g * torch.sigmoid(g))):
        found = made_by(gated, 2, 0)
        assert isinstance(found, Activation)
        assert found.up is not None
        assert (found.x.name, found.up.name) == ("g_1", "u_1")


@pytest.mark.parametrize(
    ("function", "tensors", "vectors"),
    [
        (lambda x: F.gelu(x, approximate="tanh"), 1, 0),
        (lambda x: F.relu(x), 1, 0),
        (lambda g, u: F.gelu(g) * u, 2, 0),
        (lambda x, w: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-5) * w, 1, 1),
        (lambda x, w: x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-5) * w, 1, 1),
        (lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, None, 1e-6) * b, 1, 2),
        (lambda x, w: x * w, 1, 1),
    ],
)
def test_what_is_nearly_one_of_them_is_not_taken_for_it(
    function: Callable[..., Any], tensors: int, vectors: int
) -> None:
    assert made_by(function, tensors, vectors) is None


def test_a_norm_of_a_computed_tensor_starts_where_the_norm_starts() -> None:
    graph = traced(lambda x, w: ROOT_NORMS["llama"](x.sin() + x, w), 1, 1)
    (result,) = graph.output_node().all_input_nodes
    found = recognise(result)
    assert isinstance(found, Norm)
    assert found.x.target is torch.ops.aten.add.Tensor
