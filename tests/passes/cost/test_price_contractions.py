"""Prices of contractions: rooflines by hand, measurements by the machine at hand."""

from dataclasses import replace
from pathlib import Path

import pytest

from precision_compiler.graph import contraction_rule, is_matrix_product
from precision_compiler.measure import Machine, Traffic
from precision_compiler.passes.cost.price_contractions import PriceContractions, roofline
from precision_compiler.pipeline import Unit
from precision_compiler.target import Target
from tests.helpers import graph, machine, unit_of

TEXT = "x:f32[64,32] w:f32[32,16] v:f32[16] | a = addmm v x w | b = relu a | return b"


def prices(unit: Unit) -> dict[str, dict[str, float]]:
    assert not PriceContractions().run(unit)
    return {name: dict(row) for name, row in unit.contraction_prices.items()}


def test_roofline_takes_the_slower_of_arithmetic_and_traffic() -> None:
    """1e12 bytes/s; fp32 1e12 FLOP/s, e4m3 16e12."""
    nodes = {node.name: node for node in graph(TEXT).graph.nodes}
    flops = 2 * 64 * 32 * 16
    operands, result = 64 * 32 + 32 * 16, 64 * 16
    assert roofline(nodes["a"], "fp32", machine()) == pytest.approx(flops / 1e12 + 1e-6)
    assert roofline(nodes["a"], "tf32", machine()) == pytest.approx(flops / 2e12 + 1e-6)
    slow_memory = Target(**{**vars(machine()), "bandwidth": 1e9, "machine": None})
    for fmt, width, written in (("fp32", 4, 4), ("bf16", 2, 2), ("e4m3", 1, 2), ("tf32", 4, 4)):
        size = width * operands + written * result
        found = roofline(nodes["a"], fmt, slow_memory)
        assert found == pytest.approx(size / 1e9 + 1e-6), fmt


def test_matrix_products_follow_the_tiles_of_the_target() -> None:
    """A batch is one kernel; casts are priced apart."""
    text = "x:f32[2,64,32] w:f32[2,32,16] v:f32[64,32] u:f32[32,16] b:f32[16] "
    text += "| a = bmm x w | c = mm v u | d = addmm b v u | return a c d"
    nodes = {node.name: node for node in graph(text).graph.nodes}
    target = replace(machine(), units=2)
    for fmt in machine().formats:
        alone = target.gemm_seconds(64, 16, 32, format=fmt, quantise=False)
        assert roofline(nodes["c"], fmt, target) == roofline(nodes["d"], fmt, target) == alone
        pair = target.gemm_seconds(64, 16, 32, format=fmt, quantise=False, batch=2)
        assert roofline(nodes["a"], fmt, target) == pair
        assert pair < 2 * alone


def test_what_is_no_matrix_product_keeps_its_roofline() -> None:
    nodes = {node.name: node for node in graph(MIXED).graph.nodes}
    target = replace(machine(), units=2)
    for name in ("d", "e", "h", "i"):
        assert not is_matrix_product(nodes[name])
        assert roofline(nodes[name], "bf16", target) == roofline(nodes[name], "bf16", machine())


def test_every_contraction_has_a_price_in_every_format_of_the_target() -> None:
    unit = unit_of(graph(TEXT), target=machine())
    ((name, row),) = prices(unit).items()
    assert name == unit.joint.sites[0].name
    assert set(row) == set(machine().formats)
    assert min(row.values()) > 0


def test_what_is_no_contraction_has_no_roofline() -> None:
    nodes = {node.name: node for node in graph(TEXT).graph.nodes}
    assert contraction_rule(nodes["b"]) is None
    with pytest.raises(ValueError, match="b is no contraction"):
        roofline(nodes["b"], "fp32", machine())


TRAFFIC = Traffic((1.0, 1e9), (1e-10, 0.1), (1e-10, 0.1))


def here(folder: Path, **rates: float) -> Target:
    """This machine with given matmul rates."""
    own = Machine("here", 1, rates, TRAFFIC, 1e-6, folder / "here.json")
    target = machine(**rates)
    return Target(**{**vars(target), "machine": own})


MIXED = (
    "x:f32[64,32] w:f32[32,16] q:f32[1,2,8,16] p:f32[2,3,8,8] k:f32[4,3,4,4] g:f32[2,4,2,2]"
    " | a = mm x w | b = mm x w | t = t x | c = mm t a"
    " | d = _scaled_dot_product_flash_attention_for_cpu q q q 0.0 true | o = getitem d 0"
    " | l = getitem d 1"
    " | e = _scaled_dot_product_flash_attention_for_cpu_backward o q q q o l 0.0 true"
    " | f = getitem e 0"
    " | h = convolution p k none [4,4] [0,0] [1,1] false [0,0] 1"
    " | i = convolution_backward g p k [4] [4,4] [0,0] [1,1] false [0,0] 1 [true,true,true]"
    " | j = getitem i 1 | return b c f h j"
)


def test_this_machine_times_each_distinct_call_but_products_in_slow_formats(tmp_path: Path) -> None:
    target = here(tmp_path, fp32=1e11, bf16=2e11, fp16=1e9)
    unit = unit_of(graph(MIXED), target=target)
    found = prices(unit)
    assert len(found) == 7
    names = {site.node: site.name for site in unit.joint.sites if site.kind == "contraction"}
    assert found[names["a"]]["fp32"] == found[names["b"]]["fp32"]  # the same call
    assert target.machine is not None
    assert len(target.machine.cases) == 2 * 2 + 4 * 3  # two products; attention, convolution
    slower = target.machine.matmul_flops["fp32"] / target.machine.matmul_flops["fp16"]
    for node, name in names.items():
        row = found[name]
        is_guessed = row["fp16"] == pytest.approx(row["fp32"] * slower)
        assert is_guessed == (node in ("a", "b", "c"))
        assert all(0 < row[fmt] < 1 for fmt in ("fp32", "bf16"))
    note = unit.journal.entries[-1].message
    assert note.startswith(
        "16 distinct calls on this machine: 16 timed now, 0 known from here.json"
    )
    assert note.endswith("products not timed, slower than fp32: fp16")


def test_known_calls_are_not_timed_again(tmp_path: Path) -> None:
    target = here(tmp_path, fp32=1e11)
    first = prices(unit_of(graph(TEXT), target=target))
    again = unit_of(graph(TEXT), target=target)
    assert prices(again) == first
    assert "0 timed now, 1 known" in again.journal.entries[-1].message
    assert again.journal.entries[-1].message.endswith("none")
