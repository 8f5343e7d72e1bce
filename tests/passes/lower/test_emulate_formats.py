"""Emulated formats: exact rounding of what enters the contraction, nothing else."""

import pytest
import torch
from torch import Tensor

from precision_compiler.formats import FORMATS, round_to
from precision_compiler.passes.lower.round_operands import (
    ROUND_OPERAND,
    RoundOperands,
    round_operand,
)
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from tests.helpers import graph, rewrite
from tests.random_graphs import inputs_of

HEAD = "x:f32[32,32] w:f32[32,32] v:f32[32]"
EMULATED = ("tf32", "e4m3", "e5m2")


def scaled_by_power_of_two(found: Tensor, original: Tensor, name: str) -> bool:
    """Whether ``found`` is ``original`` rounded under some power-of-two scale."""
    scales = [2.0**exponent for exponent in range(-160, 161)]
    return any(
        torch.equal((round_to(original.double() * scale, FORMATS[name]) / scale).float(), found)
        for scale in scales
    )


@pytest.mark.parametrize("name", ["tf32", "bf16", "fp16"])
def test_unscaled_format_rounds_every_element(name: str) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(round_operand(values, name), round_to(values, FORMATS[name]))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-4, 1.0, 3e5, 1e37])
def test_scaled_format_fills_its_range(name: str, size: float) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * size
    found = round_operand(values, name)
    assert found.isfinite().all()
    assert scaled_by_power_of_two(found, values, name)
    relative = ((found - values).double().norm() / values.double().norm()).item()
    assert relative < 2.0 ** -FORMATS[name].precision
    # amax lies in the format's top two binades: half the range would fit it once more
    largest = values.abs().amax()
    assert abs(found[values.abs().argmax()].abs() / largest - 1) <= 2.0 ** -FORMATS[name].precision


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_largest_value_never_saturates(name: str) -> None:
    """The scale that brings amax just below the largest number, for every fraction of a binade."""
    for fraction in torch.linspace(1, 2, 257)[:-1]:
        values = torch.tensor([float(fraction), 0.1])
        found = round_operand(values, name)
        assert abs(found[0] - values[0]) <= 2.0 ** -FORMATS[name].precision * values[0]


@pytest.mark.parametrize("name", EMULATED)
def test_zeros_and_empty_tensors(name: str) -> None:
    assert torch.equal(round_operand(torch.zeros(4, 4), name), torch.zeros(4, 4))
    assert round_operand(torch.zeros(0, 4), name).shape == (0, 4)


@pytest.mark.parametrize("name", EMULATED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_nan_or_infinity_does_not_spoil_the_rest(name: str, bad: float) -> None:
    values = torch.tensor([1.0, bad, -0.5, 0.25])
    found = round_operand(values, name)
    assert torch.equal(found[[0, 2, 3]], values[[0, 2, 3]])
    if bad != bad:
        assert found[1].isnan()
    elif not FORMATS[name].scaled:
        assert found[1] == torch.inf


@pytest.mark.parametrize("name", EMULATED)
def test_result_is_a_tensor_of_its_own_with_the_strides_promised(name: str) -> None:
    values = torch.randn(8, 4).t()
    torch.library.opcheck(ROUND_OPERAND, (values, name))
    assert round_operand(values, name).data_ptr() != values.data_ptr()


@pytest.mark.parametrize("name", EMULATED)
def test_contraction_gets_rounded_operands_and_a_float32_bias(name: str) -> None:
    described = f"{HEAD} | a = addmm v x w | return a"
    module = rewrite(graph(described), {"a": name}, InsertCasts(), RoundOperands()).joint.module
    x, w, v = inputs_of(module)
    expected = torch.addmm(v, round_operand(x, name), round_operand(w, name))
    assert torch.equal(module(x, w, v)[0], expected)


def test_one_tensor_is_rounded_once_to_each_format() -> None:
    described = f"{HEAD} | a = mm x x | b = t x | c = mm b x | d = mm b a | return c d"
    chosen = {"a": "tf32", "c": "e4m3", "d": "e4m3"}
    module = rewrite(graph(described), chosen, InsertCasts(), RoundOperands()).joint.module
    rounded = [node.args for node in module.graph.nodes if node.target is ROUND_OPERAND]
    assert sorted(f"{source} {name}" for source, name in rounded) == ["a e4m3", "x e4m3", "x tf32"]


def test_journal_says_that_the_pace_is_float32s() -> None:
    described = f"{HEAD} | a = mm x w | b = mm a w | return b"
    unit = rewrite(graph(described), {"a": "e4m3", "b": "tf32"}, InsertCasts(), RoundOperands())
    notes = [entry.message for entry in unit.journal.entries if entry.seconds == 0]
    assert notes == ["emulated here, at float32 speed: tf32, e4m3"]


@pytest.mark.parametrize("chosen", [{}, {"a": "bf16", "a.store": "bf16"}])
def test_formats_that_torch_multiplies_are_left_alone(chosen: dict[str, str]) -> None:
    unit = rewrite(graph(f"{HEAD} | a = mm x w | return a"), chosen, InsertCasts())
    assert not RoundOperands().run(unit)
