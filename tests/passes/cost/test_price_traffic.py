"""Prices of stored tensors and of casts, by hand."""

from dataclasses import replace

import pytest

from precision_compiler.formats import CHOICES
from precision_compiler.passes.cost.find_kernels import FindKernels, is_fused
from precision_compiler.passes.cost.price_traffic import PriceTraffic
from precision_compiler.pipeline import Unit
from precision_compiler.target import Target
from tests.engine.test_arithmetic import PER_ELEMENT, TOLD
from tests.helpers import graph, machine, unit_of

ELEMENTS = 32 * 32
LAUNCH = 1e-6


def priced(described: str) -> Unit:
    unit = unit_of(graph(described), target=machine())
    assert not FindKernels().run(unit)
    assert not PriceTraffic().run(unit)
    return unit


def passes(described: str, node: str) -> float:
    """How often a stored tensor crosses memory, by its price."""
    unit = priced(described)
    names = {site.node: site.name for site in unit.joint.sites if site.kind == "storage"}
    row = unit.store_prices[names[node]]
    assert set(row) == {"fp32", "bf16", "fp16"}
    assert row["bf16"] == row["fp16"] == pytest.approx(row["fp32"] / 2)
    return row["fp32"] / (4 * ELEMENTS / 1e12)


def quantised(width: float, kernels: int) -> float:
    """Seconds of moving so many bytes per element, at the round target's numbers."""
    return width * ELEMENTS / 1e12 + kernels * LAUNCH


@pytest.mark.parametrize(
    ("described", "node", "count"),
    [
        # written by a fused kernel, read by a contraction, whose price includes that
        ("x:f32[32,32] | a = relu x | b = mm a x | return b", "a", 1),
        # written by a contraction, read by one fused kernel
        ("x:f32[32,32] | a = mm x x | b = relu a | c = neg a | return b c", "a", 1),
        ("x:f32[32,32] | a = mm x x | b = mm a x | c = mm b x | return c", "a", 0),
        # read before and behind another contraction: two kernels
        ("x:f32[32,32] | a = mm x x | b = relu a | c = mm b x | d = add c a | return d", "a", 2),
        # read forward and backward: two kernels
        ("x:f32[32,32] | a = mm x x | b = relu a | c@backward = neg a | return b c", "a", 2),
        ("x:f32[32,32] | a = mm x x | t = t a | b = relu t | return b", "a", 1),
    ],
)
def test_tensor_is_written_once_and_read_once_per_kernel(
    described: str, node: str, count: int
) -> None:
    assert passes(described, node) == pytest.approx(count)


def test_cast_joins_the_kernel_that_makes_the_tensor() -> None:
    row = priced("x:f32[32,32] | a = relu x | b = mm a x | return b").cast_prices["a"]
    assert row["bf16"] == pytest.approx(2 * ELEMENTS / 1e12)
    # the first look for its amax joins as well; three kernels remain, and the bf16 is read again
    assert row["e4m3"] == pytest.approx(quantised(2 + 1, kernels=3))


def test_cast_of_an_input_or_a_contractions_result_is_a_kernel_of_its_own() -> None:
    prices = priced("x:f32[32,32] | a = mm x x | b = mm a x | return b").cast_prices
    for source, width in (("x", 4), ("a", 2)):  # a is stored, in 16 bits when it is quantised
        assert prices[source]["bf16"] == pytest.approx((2 + 4) * ELEMENTS / 1e12 + LAUNCH)
        assert prices[source]["e4m3"] == pytest.approx(quantised(2 * width + 1, kernels=4))


@pytest.mark.parametrize(
    ("name", "fmt"), [("h100", "e4m3"), ("b300", "e4m3"), ("b300", "mxfp8"), ("b300", "nvfp4")]
)
def test_copies_cost_what_the_model_of_products_takes_for_quantising(name: str, fmt: str) -> None:
    """Gauged on published times; both operands are bf16 results, the left one summed both ways."""
    target = Target.load(name)
    text = "x:f32[64,64] | a = mm x x | b = mm x x | t = t a | c = mm a b | d = mm t b"
    unit = unit_of(graph(f"{text} | return c d"), target=target)
    FindKernels().run(unit)
    PriceTraffic().run(unit)
    scaling = "tensor" if fmt == "e4m3" else "block"
    both, alone = (
        target.gemm_seconds(64, 64, 64, format=fmt, scaling=scaling, quantise=quantise)
        for quantise in (True, False)
    )
    copies = unit.cast_prices["a"][fmt] + unit.cast_prices["b"][fmt]
    assert copies == pytest.approx(both - alone)


@pytest.mark.parametrize(("fmt", "reads", "kernels"), [("mxfp8", 0, 1), ("nvfp4", 1, 4)])
def test_blocks_of_a_fused_tensor_are_cast_where_it_is_made(
    fmt: str, reads: int, kernels: int
) -> None:
    """MX needs nothing but the kernel that arranges scales; NVFP4 first the amax of the tensor."""
    target = Target.load("b300")
    unit = unit_of(graph("x:f32[32,32] | a = relu x | b = mm a x | return b"), target=target)
    FindKernels().run(unit)
    PriceTraffic().run(unit)
    bytes_moved = ELEMENTS * (2 * reads + CHOICES[fmt].bytes)
    expected = bytes_moved / (0.75 * 8e12) + kernels * target.issue_seconds
    assert unit.cast_prices["a"][fmt] == pytest.approx(expected)


def test_every_operand_and_result_of_a_contraction_has_prices_in_every_format() -> None:
    unit = priced("x:f32[32,32] y:f32[32,32] | t = t x | a = mm t x | b = relu y | return a b")
    assert set(unit.cast_prices) == {"x", "a"}
    wanted = set(unit.target.choices)
    assert all(set(row) == wanted for row in unit.cast_prices.values())


@pytest.mark.parametrize(
    ("op", "joins"), [("relu x", True), ("sum x", True), ("mm x x", False), ("t x", False)]
)
def test_what_fuses_is_pointwise_or_a_reduction(op: str, joins: bool) -> None:
    nodes = {node.name: node for node in graph(f"x:f32[4,4] | a = {op} | return a").graph.nodes}
    assert is_fused(nodes["a"]) == joins
    assert not is_fused(nodes["x"])


@pytest.mark.parametrize(
    ("readers", "ways"),
    [
        ("b = mm x y", 1),  # sums over x's rows
        ("b = mm t y", 1),  # and over its columns
        ("b = mm x y | c = mm t y", 2),
        ("b = mm x y | c = mm x t", 1),  # a transposed view is summed over x's rows again
    ],
)
def test_rows_only_hardware_needs_a_copy_for_each_way_of_summing(readers: str, ways: int) -> None:
    results = " ".join(word for word in "bc" if f"{word} =" in readers)
    unit = unit_of(
        graph(f"x:f32[32,32] y:f32[32,32] | t = t x | {readers} | return {results}"),
        target=machine(fp32=1e12, e4m3=4e12),
    )
    rates = {name: replace(rate, layouts="tn") for name, rate in unit.target.formats.items()}
    unit.machine = replace(unit.target, formats=rates)
    FindKernels().run(unit)
    PriceTraffic().run(unit)
    price = unit.cast_prices["x"]["e4m3"]
    assert price == pytest.approx(quantised(4 + 4 + ways, kernels=4))


def test_arithmetic_of_fused_kernels_is_part_of_the_fixed_time_of_this_machine() -> None:
    found = {}
    for op in ("neg", "exp"):
        joint = graph(f"x:f32[32,32] | a = {op} x | b = mm a x | return b")
        unit = unit_of(joint, target=replace(machine(), machine=TOLD))
        FindKernels().run(unit)
        PriceTraffic().run(unit)
        found[op] = unit.fixed_seconds
    slower = PER_ELEMENT["exp"] - PER_ELEMENT["neg"]
    assert found["exp"] - found["neg"] == pytest.approx(slower * ELEMENTS)
