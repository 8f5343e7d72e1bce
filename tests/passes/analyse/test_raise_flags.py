"""Range vetoes: overflow and underflow as computed by hand."""

import numpy as np
import pytest

from precision_compiler.errors import InternalError
from precision_compiler.formats import FORMATS
from precision_compiler.passes.analyse.veto_ranges import VetoRanges
from precision_compiler.statistics import Sensitivity, Statistics
from tests.helpers import graph, machine, unit_of

TEXT = "x:f32[32,32] | a = mm x x | return a"


def around(exponent: int, largest: float | None = None) -> Sensitivity:
    """All weight in the binade of ``2**exponent``."""
    weight = np.zeros(255)
    weight[exponent + 126] = 1.0
    return Sensitivity(weight, 2.0**exponent * 1.5 if largest is None else largest)


def vetoes(store: Sensitivity, operand: Sensitivity, **options: float) -> dict[str, dict[str, str]]:
    """Reasons by kind of site and format."""
    unit = unit_of(graph(TEXT), target=machine())
    contraction, storage = (site.name for site in unit.joint.sites)
    operands = {(contraction, 0): around(0), (contraction, 1): operand}
    unit.statistics = Statistics({storage: store}, operands, {}, 1.0, 1.0)
    assert not VetoRanges(**options).run(unit)  # type: ignore[arg-type]
    found: dict[str, dict[str, str]] = {"contraction": {}, "storage": {}}
    kinds = {site.name: site.kind for site in unit.joint.sites}
    for (site, fmt), reason in unit.vetoes.items():
        found[kinds[site]][fmt] = reason
    return found


def test_moderate_values_rule_nothing_out() -> None:
    assert vetoes(around(0), around(0)) == {"contraction": {}, "storage": {}}


@pytest.mark.parametrize(("largest", "out"), [(4094.0, False), (4095.0, True), (1e30, True)])
def test_overflow_of_fp16_within_sixteen_times(largest: float, out: bool) -> None:
    found = vetoes(around(0, largest), around(0))
    assert ("fp16" in found["storage"]) == out
    assert "bf16" not in found["storage"]
    if out:
        assert found["storage"]["fp16"].startswith("overflow: largest magnitude")


def test_overflow_of_an_operand_rules_out_its_contraction_alone() -> None:
    found = vetoes(around(0), around(0, 1e37))
    assert found["storage"] == {}
    assert set(found["contraction"]) == {"fp16"}
    assert set(vetoes(around(0), around(0, 1e38))["contraction"]) == {"tf32", "bf16", "fp16"}


@pytest.mark.parametrize(("exponent", "out"), [(-9, False), (-11, False), (-12, True), (-30, True)])
def test_underflow_of_fp16_begins_where_shrunken_values_lose_bits(exponent: int, out: bool) -> None:
    """2**-14 is the smallest normal number; four binades of drift may cost one bit at most."""
    found = vetoes(around(exponent), around(0))
    assert ("fp16" in found["storage"]) == out
    assert "bf16" not in found["storage"]
    if out:
        assert found["storage"]["fp16"].startswith("underflow: the error would be")


def test_scaled_formats_and_float32_are_never_ruled_out() -> None:
    found = vetoes(around(-60), around(-60, 1e38))
    assert "e4m3" not in found["contraction"]
    assert not {"fp32"} & (set(found["contraction"]) | set(found["storage"]))


def test_options_move_the_limits() -> None:
    assert "fp16" in vetoes(around(0, 4095.0), around(0))["storage"]
    assert "fp16" not in vetoes(around(0, 4095.0), around(0), margin=0)["storage"]
    assert "fp16" not in vetoes(around(-13), around(0), growth=100.0)["storage"]


def test_site_that_no_gradient_depends_on_stays_float32() -> None:
    silent = Sensitivity(np.zeros(255), 1.0)
    found = vetoes(silent, around(0))
    assert found["contraction"] == {}  # one of its arguments speaks
    assert set(found["storage"]) == {"bf16", "fp16"}
    assert found["storage"]["bf16"].startswith("silence: no gradient depends on it")


@pytest.mark.parametrize("bad", [float("inf"), 1e39])
def test_infinite_values_rule_out_every_narrow_unscaled_format(bad: float) -> None:
    assert set(vetoes(around(0, bad), around(0))["storage"]) == {"bf16", "fp16"}


def test_reasons_are_one_line() -> None:
    found = vetoes(around(-30), around(0, 1e38))
    for reason in [*found["storage"].values(), *found["contraction"].values()]:
        assert "\n" not in reason
        assert reason.split(":")[0] in ("overflow", "underflow", "silence")


def test_without_statistics_the_order_is_wrong() -> None:
    with pytest.raises(InternalError):
        VetoRanges().run(unit_of(graph(TEXT), target=machine()))


def test_every_reason_names_a_format_of_the_target() -> None:
    assert set(machine().formats) < set(FORMATS)
