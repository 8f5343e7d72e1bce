"""Every rule fires exactly where it says, worked out by hand, and not just beside it."""

import re
from collections.abc import Mapping
from dataclasses import replace
from math import frexp, isfinite

import numpy as np
import pytest
import torch

from precision_compiler.budget import Budget
from precision_compiler.errors import InternalError
from precision_compiler.flags import FLAGS
from precision_compiler.journal import Journal
from precision_compiler.passes.analyse.raise_flags import RaiseFlags
from precision_compiler.pipeline import Unit
from precision_compiler.statistics import (
    Accumulated,
    Measured,
    Sensitivity,
    Statistics,
    TensorGradient,
)
from precision_compiler.target import Target
from tests.helpers import graph, joint_of, machine, unit_of

TEXT = "x:f32[32,32] w:f32[32,32] | a = mm x w | return a"


def counts(share: Mapping[int, int]) -> np.ndarray:
    """Elements by binade."""
    found = np.zeros(255)
    for exponent, number in share.items():
        found[exponent + 126] = number
    return found


def around(exponent: int, amax: float | None = None, error: float = 1e-3) -> Sensitivity:
    """A thousand numbers from ``2**exponent``, whose rounding to bf16 changes the gradient."""
    per_ulp = error**2 * 12 / 4.0 ** (exponent - 7)
    weight = np.tile(counts({exponent: 1}) * per_ulp, (3, 1))
    largest = 1.5 * 2.0**exponent if amax is None else amax
    return Sensitivity(weight, largest, counts({exponent: 1000}), 1000)


def flagged(
    store: Sensitivity | None = None,
    operands: tuple[Sensitivity, ...] = (),
    rule: RaiseFlags | None = None,
    rest: Statistics | None = None,
    rate: float | None = None,
    target: Target | None = None,
) -> Unit:
    """A unit of one product, its flags raised from the given statistics."""
    unit = unit_of(graph(TEXT), target=target or machine(), parameters=["w"])
    unit.joint.inputs = [torch.ones(32, 32), torch.full((32, 32), 2.0**-6)]
    unit.joint.inputs[1][:8] = -1.5
    unit.learning_rate = rate
    contraction, storage = (site.name for site in unit.joint.sites)
    given = operands or (around(0), around(0))
    unit.statistics = replace(
        rest or Statistics({}, {}, {}),
        stores={storage: store or around(0)},
        operands={(contraction, index): seen for index, seen in enumerate(given)},
    )
    assert not (rule or RaiseFlags()).run(unit)
    return unit


def names(unit: Unit, fmt: str | None, veto: bool | None = None) -> set[str]:
    """Flags of a format."""
    return {f.name for f in unit.flags if f.format == fmt and veto in (None, f.veto)}


def test_moderate_values_raise_no_flag() -> None:
    unit = flagged()
    assert unit.flags == []
    assert unit.vetoes == {}


@pytest.mark.parametrize(
    ("amax", "margin", "out"),
    [
        (32752.0, 1, set()),
        (32753.0, 1, {"fp16"}),
        (65504.0, 0, set()),
        (65505.0, 0, {"fp16"}),
        (1.694e38, 1, {"fp16"}),
        (1.696e38, 1, {"fp16", "bf16"}),
        (1.701e38, 1, {"fp16", "bf16", "tf32"}),
        (float("inf"), 1, {"fp16", "bf16", "tf32"}),
    ],
)
def test_overflow_begins_where_the_margin_leaves_the_range(
    amax: float, margin: int, out: set[str]
) -> None:
    """A margin of 1 is a factor of two; e4m3 has a scale, float32 is what there is anyway."""
    high = around(frexp(min(amax, 3e38))[1] - 1, amax)
    unit = flagged(operands=(around(0), high), rule=RaiseFlags(margin=margin))
    assert {flag.format for flag in unit.flags if flag.name == "overflow"} == out
    assert {fmt for _, fmt in unit.vetoes} == out
    assert all(isfinite(flag.numbers["amax"]) for flag in unit.flags if flag.name == "overflow")


@pytest.mark.parametrize(("exponent", "out"), [(-10, False), (-11, False), (-12, True)])
def test_underflow_begins_where_shrunken_values_lose_bits(exponent: int, out: bool) -> None:
    """2**-14 is fp16's smallest normal number: with 2**-4, 2**-11 loses one bit, 2**-12 two."""
    unit = flagged(around(exponent))
    assert names(unit, "fp16") == ({"underflow"} if out else set())
    assert names(unit, "bf16") == set()
    assert names(flagged(around(exponent), rule=RaiseFlags(drift=3)), "fp16") == set()
    assert names(flagged(around(-12), rule=RaiseFlags(growth=4.1)), "fp16") == set()
    scaled = flagged(operands=(around(-60), around(-60)))
    assert names(scaled, "e4m3") == set()


@pytest.mark.parametrize("lost", [500, 501])
def test_flush_is_more_than_half_of_the_elements(lost: int) -> None:
    """The binade of half the smallest subnormal still rounds up; the one below rounds to zero."""
    small = counts({-25: 1000 - lost, -26: lost})
    unit = flagged(replace(around(0), count=small))
    assert names(unit, "fp16", veto=True) == ({"flush"} if lost > 500 else set())
    assert names(unit, "bf16") == set()
    scaled = counts({-2: 1000 - lost, -3: lost})  # amax 448 * 2^8: scaled by 2^-8
    unit = flagged(operands=(around(0), replace(around(0, 448.0 * 2**8), count=scaled)))
    assert names(unit, "e4m3", veto=True) == ({"flush"} if lost > 500 else set())


@pytest.mark.parametrize(
    ("ratio", "error", "name", "veto"),
    [
        (2.99, 5e-3, set(), False),
        (3.01, 3e-3, {"coherent"}, False),
        (3.01, 3.5e-3, {"coherent"}, True),
    ],
)
def test_errors_are_coherent_above_three_and_harmful_above_one_per_cent(
    ratio: float, error: float, name: set[str], veto: bool
) -> None:
    real = Measured(error**2, (ratio * error) ** 2)
    unit = flagged(replace(around(0, error=error), measured={"bf16": real}))
    assert names(unit, "bf16") == name
    assert names(unit, "fp16") == set()
    for flag in unit.flags:
        assert flag.numbers["error"] == pytest.approx(ratio * error)
        assert flag.veto == veto


def test_invalid_is_the_error_of_a_site_with_all_its_arguments() -> None:
    """0.2 and 0.2 are within 0.3, 0.22 and 0.22 are not: 0.311 together."""
    for error, expected in ((0.2, set()), (0.22, {"invalid"})):
        unit = flagged(operands=(around(0, error=error), around(0, error=error)))
        assert names(unit, "bf16", veto=True) == expected
        assert names(unit, "fp16") == set()
        assert names(unit, "e4m3", veto=True) == {"invalid"}
    (flag,) = (flag for flag in unit.flags if flag.format == "bf16")
    assert flag.numbers["error"] == pytest.approx(0.22 * 2**0.5)


def test_silence_is_a_site_that_no_metric_depends_on() -> None:
    silent = replace(around(0), weight=np.zeros((3, 255)))
    heard = replace(silent, weight=np.stack([silent.weight[0]] * 2 + [around(0).weight[0]]))
    assert names(flagged(silent), "bf16", veto=True) == {"silence"}
    assert names(flagged(heard), "bf16") == set()  # the loss depends on it
    unit = flagged(operands=(silent, around(0)))
    assert unit.vetoes == {}  # one argument speaks
    unit = flagged(operands=(silent, silent))
    assert {fmt for _, fmt in unit.vetoes} == {"tf32", "bf16", "fp16", "e4m3"}


@pytest.mark.parametrize("size", [1, 2])
def test_single_element_is_a_remark_and_no_veto(size: int) -> None:
    unit = flagged(replace(around(0), size=size))
    assert names(unit, "bf16", veto=False) == ({"single-element"} if size == 1 else set())
    assert unit.vetoes == {}


def test_sum_is_flagged_where_bf16_has_fewer_steps_than_it_has_terms() -> None:
    unit = flagged(rest=Statistics({}, {}, {}, sums={"short": 256.0, "long": 257.0}))
    (flag,) = unit.flags
    assert (flag.name, flag.site, flag.veto) == ("same-sign-sum", "long", False)
    assert unit.vetoes == {}


@pytest.mark.parametrize(("density", "flagged_nodes"), [(0.16, ["first", "second"]), (0.14, [])])
def test_flips_are_flagged_where_all_together_count(
    density: float, flagged_nodes: list[str]
) -> None:
    """Of 0.00166 that bf16 errs by, a density of 0.151 makes an error of 0.01."""
    flips = {"first": density / 4, "second": density * 0.75}
    unit = flagged(rest=Statistics({}, {}, {}, flips=flips))
    assert [flag.site for flag in unit.flags] == flagged_nodes
    assert not any(flag.veto or flag.name != "flips" for flag in unit.flags)
    total = sum(flag.numbers["error"] ** 2 for flag in unit.flags)
    assert total == pytest.approx(1e-4 * density / 0.1512 if flagged_nodes else 0.0, rel=1e-3)


def test_zero_gradients_are_named_and_others_are_not() -> None:
    tensors = (
        TensorGradient("noise", 1.0, 0.1, 8),
        TensorGradient("small", 1.0, 0.099, 8),
        TensorGradient("nothing", 0.0, 0.0, 8),
    )
    unit = flagged(rest=Statistics({}, {}, {}, tensors=tensors))
    assert [(flag.name, flag.site) for flag in unit.flags] == [
        ("zero-gradient", "noise"),
        ("zero-gradient", "nothing"),
    ]


@pytest.mark.parametrize(
    ("rate", "share"), [(None, 0), (2.0**-13, 0.25), (2.0**-8 * 0.99, 0.25), (2.0**-8, 0)]
)
def test_update_swamping_counts_weights_that_half_an_ulp_holds_back(
    rate: float | None, share: float
) -> None:
    """The spacing of bf16 from 1 to 2 is 2^-7; from 2^-6 on it is 2^-13."""
    unit = flagged(rate=rate)
    assert [flag.numbers["share"] for flag in unit.flags] == ([share] if share else [])
    assert unit.vetoes == {}


@pytest.mark.parametrize("terms", [256.0, 257.0])
def test_narrow_accumulation_is_a_veto_where_sums_would_stop_growing(terms: float) -> None:
    usual = machine()
    narrow = replace(usual.formats["bf16"], accumulate="bf16")
    target = replace(usual, formats={**usual.formats, "bf16": narrow})
    summed = {("linear.fprop", "bf16"): Accumulated(1e-4, terms)}
    unit = flagged(rest=Statistics({}, {}, {}, accumulations=summed), target=target)
    (flag,) = unit.flags
    assert (flag.name, flag.site, flag.format) == ("accumulation", "linear.fprop", "bf16")
    assert flag.numbers == {"error": 0.01, "terms": terms, "steps": 256.0}
    assert flag.veto == (terms > 256)
    assert set(unit.vetoes) == ({("linear.fprop", "bf16")} if terms > 256 else set())


def test_nodes_that_are_no_site_get_vetoes_by_range_alone() -> None:
    wide, low = counts({28: 2, 2: 98}), counts({-30: 100})
    ranges = {
        "square": Sensitivity(np.zeros((3, 255)), 5.6e8, wide, 100),
        "cube": Sensitivity(np.zeros((3, 255)), 2e-9, low, 100),
    }
    unit = flagged(rest=Statistics({}, {}, {}, ranges=ranges))
    assert {key: reason.split(":")[0] for key, reason in unit.vetoes.items()} == {
        ("square", "fp16"): "overflow",
        ("square", "e4m3"): "flush",
        ("cube", "fp16"): "flush",
    }


def test_sentence_holds_every_number_of_its_flag() -> None:
    seen = replace(around(-30, 1e38), measured={"bf16": Measured(0.01, 0.16)})
    rest = Statistics({}, {}, {}, sums={"long": 300.0}, ranges={"rest": around(-60, 1.0)})
    flips, noisy = {"relu": 0.5}, (TensorGradient("bias", 2e-9, 1e-9, 8),)
    unit = flagged(seen, rest=replace(rest, tensors=noisy, flips=flips), rate=1e-3)
    shown = {flag.name for flag in unit.flags}
    assert shown == set(FLAGS) - {
        *("trust-region", "unverified", "unmeasured"),  # of whole plans
        *("accumulation", "silence", "single-element"),
        "bias",  # of products of gradients
    }
    for flag in unit.flags:
        words = re.findall(r"[\d.]+(?:e[+-]\d+)?%?", flag.sentence)
        values = [float(w[:-1]) / 100 if w[-1] == "%" else float(w) for w in words]
        for name, number in flag.numbers.items():
            assert any(value == pytest.approx(number, rel=0.06) for value in values), (flag, name)


def test_without_statistics_the_order_is_wrong() -> None:
    with pytest.raises(InternalError):
        RaiseFlags().run(Unit(joint_of(graph(TEXT)), machine(), Budget.parse(1.0), Journal()))
