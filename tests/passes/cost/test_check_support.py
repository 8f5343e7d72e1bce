"""What block scales cannot do, with the reason."""

from dataclasses import replace

import pytest

from precision_compiler.passes.cost.check_support import CheckSupport
from precision_compiler.pipeline import Unit
from precision_compiler.target import Target
from tests.helpers import graph, unit_of


def checked(described: str, *formats: str) -> Unit:
    known = Target.load("b200")
    rates = {name: known.rate(name) for name in ("fp32", "bf16", "e4m3", *formats)}
    unit = unit_of(graph(described), target=replace(known, formats=rates))
    assert not CheckSupport().run(unit)
    return unit


@pytest.mark.parametrize(
    ("fmt", "length", "fits"),
    [("mxfp8", 64, True), ("mxfp8", 48, False), ("nvfp4", 48, True), ("nvfp4", 40, False)],
)
def test_sums_divide_into_blocks(fmt: str, length: int, fits: bool) -> None:
    unit = checked(f"x:f32[8,{length}] w:f32[{length},8] | a = mm x w | return a", fmt)
    ((site, _),) = unit.links.contractions.items()
    assert ((site, fmt) not in unit.vetoes) == fits
    assert (site, "e4m3") not in unit.vetoes
    if not fits:
        block = 32 if fmt == "mxfp8" else 16
        assert unit.vetoes[site, fmt] == (
            f"support: the sum over {length} elements does not divide into blocks of {block}"
        )


def test_attention_has_no_scales() -> None:
    unit = checked(
        "q:f32[1,2,32,32] | d = _scaled_dot_product_flash_attention_for_cpu q q q 0.0 true"
        " | o = getitem d 0 | return o",
        "mxfp8",
    )
    ((site, _),) = unit.links.contractions.items()
    assert "two matrices, not attention" in unit.vetoes[site, "mxfp8"]
    assert "two matrices, not attention" in unit.vetoes[site, "e4m3"]
    assert (site, "bf16") not in unit.vetoes


def test_batches_have_tf32_but_no_scales() -> None:
    unit = checked("x:f32[2,32,32] | a = bmm x x | return a", "tf32")
    ((site, _),) = unit.links.contractions.items()
    assert {fmt for name, fmt in unit.vetoes if name == site} == {"e4m3", "e4m3_row"}


def test_a_format_that_no_kernel_multiplies_is_ruled_out() -> None:
    unit = checked("x:f32[32,64] w:f32[64,32] | a = mm x w | return a", "mxfp6", "mxfp8")
    ((site, _),) = unit.links.contractions.items()
    assert "no kernel multiplies mxfp6" in unit.vetoes[site, "mxfp6"]
    assert (site, "mxfp8") not in unit.vetoes


def test_an_earlier_veto_keeps_its_reason() -> None:
    unit = unit_of(
        graph("x:f32[8,40] w:f32[40,8] | a = mm x w | return a"), target=Target.load("b200")
    )
    ((site, _),) = unit.links.contractions.items()
    unit.vetoes[site, "mxfp8"] = "overflow: first"
    CheckSupport().run(unit)
    assert unit.vetoes[site, "mxfp8"] == "overflow: first"
