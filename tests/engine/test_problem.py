"""How choices add up: seconds, casts, variances and legality, by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from precision_compiler.formats import FORMATS
from precision_compiler.links import Link, Links
from precision_compiler.problem import (
    PAIR_COUNTS,
    Prices,
    Problem,
    argument_format,
    entry_format,
    fixes_result,
)
from precision_compiler.sites import Site
from precision_compiler.statistics import (
    METRICS,
    Accumulated,
    Correlation,
    Edge,
    Sensitivity,
    Statistics,
)


def weight(size: float) -> np.ndarray:
    """On numbers from 1 to 2."""
    found = np.zeros(255)
    found[126] = size
    return found


def one(*sizes: float) -> Sensitivity:
    """A weight for each metric, 1 if not said."""
    rows = sizes or (1.0,) * len(METRICS)
    return Sensitivity(np.stack([weight(size) for size in rows]), 1.5)


def site(name: str, kind: str) -> Site:
    return Site(name, "storage" if kind == "s" else "contraction", "fprop", "mm", name, "", ())


@pytest.fixture
def problem() -> Problem:
    """X -> c1 -> s1 -> c2 and c3, which also reads s1 twice."""
    contractions = {name: site(name, "c") for name in ("c1", "c2", "c3")}
    reads = (
        Link("c1", 0, "x", None),
        Link("c2", 0, "s1", "s1"),
        Link("c3", 0, "s1", "s1"),
        Link("c3", 1, "s1", "s1"),
    )
    links = Links(contractions, {"s1": site("s1", "s")}, reads, {"c1": ("s1",), "c2": (), "c3": ()})
    formats = ("fp32", "tf32", "bf16", "fp16", "e4m3")
    options = {**dict.fromkeys(contractions, formats), "s1": ("fp32", "bf16", "fp16")}
    prices = Prices(
        dict.fromkeys(contractions, dict.fromkeys(formats, 100.0)),
        {"s1": {"fp32": 10.0, "bf16": 5.0, "fp16": 5.0}},
        dict.fromkeys(("x", "s1"), dict.fromkeys(FORMATS, 1.0)),
    )
    operands = {(link.contraction, link.argument): one() for link in reads}
    statistics = Statistics({"s1": one()}, operands, {"c3": (one(), one())})
    return Problem(links, options, prices, statistics)


ULP = {name: 2.0 ** (2 * (1 - FORMATS[name].precision)) / 12 for name in FORMATS}


@pytest.mark.parametrize(
    ("formats", "casts", "seconds"),
    [
        (("fp32", "fp32", "fp32", "fp32"), set(), 310),
        (("tf32", "tf32", "tf32", "fp32"), set(), 310),  # read as float32 bits
        (("bf16", "bf16", "bf16", "bf16"), {("x", "bf16")}, 306),
        (("fp32", "bf16", "bf16", "fp32"), {("s1", "bf16")}, 311),  # one copy for three readings
        (("fp32", "bf16", "fp16", "fp32"), {("s1", "bf16"), ("s1", "fp16")}, 312),
        (("bf16", "fp32", "bf16", "bf16"), {("x", "bf16"), ("s1", "fp32")}, 307),
        (("fp32", "e4m3", "e4m3", "fp32"), {("s1", "e4m3")}, 311),
    ],
)
def test_copies_are_counted_and_paid_once(
    problem: Problem, formats: tuple[str, ...], casts: set[tuple[str, str]], seconds: float
) -> None:
    assignment = dict(zip(("c1", "c2", "c3", "s1"), formats, strict=True))
    assert problem.casts(assignment) == casts
    assert problem.seconds(assignment) == seconds


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("fp32", "fp32", "fp32", "fp32"), {}),
        (("tf32", "fp32", "fp32", "fp32"), {"c1": ULP["tf32"]}),
        (("bf16", "fp32", "fp32", "bf16"), {"c1": ULP["bf16"], "s1": ULP["bf16"]}),
        # a tensor in bf16 is not rounded again on its way into bf16, fp16 or tf32
        (("fp32", "bf16", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "fp16", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "tf32", "fp32", "bf16"), {"s1": ULP["bf16"]}),
        (("fp32", "bf16", "fp32", "fp16"), {"s1": ULP["fp16"], "c2": ULP["bf16"]}),
        # both arguments and both intermediate results
        (("fp32", "fp32", "bf16", "fp32"), {"c3": 4 * ULP["bf16"]}),
        (("fp32", "fp32", "bf16", "bf16"), {"c3": 2 * ULP["bf16"], "s1": ULP["bf16"]}),
    ],
)
def test_variances_add_up(
    problem: Problem, formats: tuple[str, ...], expected: dict[str, float]
) -> None:
    assignment = dict(zip(("c1", "c2", "c3", "s1"), formats, strict=True))
    found = problem.variances(assignment)
    assert set(found) == {"c1", "c2", "c3", "s1"}
    for name, variance in found.items():
        assert variance == pytest.approx(expected.get(name, 0.0)), name
    assert problem.variance(assignment) == pytest.approx(sum(expected.values()))
    assert problem.error(assignment) == pytest.approx(sum(expected.values()) ** 0.5)


def test_every_metric_adds_up_its_own_weights(problem: Problem) -> None:
    stores = {"s1": one(1.0, 4.0, 9.0, 16.0)}
    seen = replace(problem, statistics=replace(problem.statistics, stores=stores))
    kept = seen.uniform() | {"s1": "bf16"}
    found = [seen.error(kept, metric) for metric in range(len(METRICS))]
    assert found == pytest.approx([i * ULP["bf16"] ** 0.5 for i in (1, 2, 3, 4)])


def test_narrow_running_sums_add_to_the_contraction_that_has_them(problem: Problem) -> None:
    sums = {("c3", "bf16"): Accumulated(0.5, 9.0)}
    seen = replace(problem, statistics=replace(problem.statistics, accumulations=sums))
    read = seen.uniform() | {"c3": "bf16"}
    assert seen.variances(read)["c3"] == pytest.approx(4 * ULP["bf16"] + 0.5)
    assert seen.variances(read, 1) == problem.variances(read, 1)
    other = seen.uniform() | {"c3": "fp16", "c2": "bf16"}
    assert seen.variances(other) == problem.variances(other)


BOTH = ("c3", 0), ("c3", 1)  # readers of s1


def correlated(problem: Problem, *pairs: tuple[Edge, Edge, float], **measured: float) -> Problem:
    found = tuple(
        Correlation(first, second, weight(shared), measured, 1.5) for first, second, shared in pairs
    )
    return replace(problem, statistics=replace(problem.statistics, correlations=found))


@pytest.mark.parametrize("shared", [1.0, 0.5, -0.5, -1.0])
def test_readers_of_one_rounded_copy_add_their_covariance(problem: Problem, shared: float) -> None:
    """(h + h')^2 d^2 = (1 + 1 + 2 h h') d^2, half of the last to each."""
    known = correlated(problem, (("c2", 0), BOTH[0], shared))
    read = known.uniform() | {"c2": "bf16", "c3": "bf16"}
    found = known.variances(read)
    assert found["c2"] == pytest.approx((1 + shared) * ULP["bf16"])
    assert found["c3"] == pytest.approx((4 + shared) * ULP["bf16"])
    assert known.error(read) == pytest.approx(((5 + 2 * shared) * ULP["bf16"]) ** 0.5)


def test_both_arguments_of_one_contraction_may_be_the_readers(problem: Problem) -> None:
    known = correlated(problem, (*BOTH, -1.0))
    found = known.variances(known.uniform() | {"c3": "bf16"})
    assert found["c3"] == pytest.approx(2 * ULP["bf16"])  # what is left are the internal ones


@pytest.mark.parametrize(
    "formats",
    [
        {"c2": "bf16"},  # one reader alone
        {"c2": "bf16", "c3": "fp16"},  # two copies, rounded independently
        {"c2": "bf16", "c3": "bf16", "s1": "bf16"},  # rounded before, not by the readers
        {"c2": "fp16", "c3": "fp16", "s1": "bf16"},
    ],
)
def test_readers_go_together_only_where_both_round_to_one_format(
    problem: Problem, formats: Mapping[str, str]
) -> None:
    known = correlated(problem, (("c2", 0), BOTH[0], 1.0))
    assignment = known.uniform() | dict(formats)
    assert known.variances(assignment) == problem.variances(assignment)


def test_weak_correlations_are_left_out(problem: Problem) -> None:
    edges = ("c2", 0), BOTH[0]
    for sign in (-1, 1):
        assert not correlated(problem, (*edges, sign * PAIR_COUNTS * 0.99)).pairs
        ((first, second, _),) = correlated(problem, (*edges, sign * PAIR_COUNTS * 1.01)).pairs
        assert (first, second) == (Link("c2", 0, "s1", "s1"), Link("c3", 0, "s1", "s1"))
    silent = {**problem.statistics.operands, ("c2", 0): one(0, 0, 0)}
    known = replace(problem, statistics=replace(problem.statistics, operands=silent))
    assert not correlated(known, (*edges, 0.0)).pairs


def test_scaled_formats_take_the_covariance_that_was_measured(problem: Problem) -> None:
    known = correlated(problem, (("c2", 0), BOTH[0], 1.0), e4m3=-1e-6)
    read = known.uniform() | {"c2": "e4m3"}
    alone = known.variance(read) + known.variance(known.uniform() | {"c3": "e4m3"})
    assert known.variance(read | {"c3": "e4m3"}) == pytest.approx(alone - 2e-6)


def test_other_metrics_take_readers_as_independent(problem: Problem) -> None:
    known = correlated(problem, (("c2", 0), BOTH[0], 1.0))
    read = known.uniform() | {"c2": "bf16", "c3": "bf16"}
    assert known.variances(read, 2) == problem.variances(read, 2)


def test_error_of_effects_that_cancel_is_not_below_zero(problem: Problem) -> None:
    known = correlated(problem, (("c2", 0), BOTH[0], -3.0))
    read = known.uniform() | {"c2": "bf16", "c3": "bf16"}
    assert sum(known.variances(read).values()) < 0
    assert known.error(read) == 0.0


@pytest.fixture
def moved() -> Problem:
    """Stores s1 and s2, and s3 which shows elements of both."""
    stores = {name: site(name, "s") for name in ("s1", "s2", "s3")}
    formats = ("fp32", "bf16", "fp16")
    statistics = Statistics(dict.fromkeys(stores, one()), {}, {}, exact={"s3": ("s1", "s2")})
    prices = Prices({}, dict.fromkeys(stores, dict.fromkeys(formats, 1.0)), {})
    return Problem(Links({}, stores, (), {}), dict.fromkeys(stores, formats), prices, statistics)


@pytest.mark.parametrize(
    ("formats", "rounded"),
    [
        (("fp32", "fp32", "bf16"), True),
        (("bf16", "fp32", "bf16"), True),  # elements of s2 have more bits
        (("bf16", "bf16", "bf16"), False),
        (("bf16", "bf16", "fp16"), False),  # more bits than either
        (("fp16", "bf16", "bf16"), True),
        (("fp16", "bf16", "fp16"), False),
    ],
)
def test_tensor_that_shows_others_bits_is_rounded_only_to_fewer_of_them(
    moved: Problem, formats: Sequence[str], rounded: bool
) -> None:
    assert moved.exact_sources("s3") == ("s1", "s2")
    found = moved.variances(dict(zip(("s1", "s2", "s3"), formats, strict=True)))
    assert [found["s1"], found["s2"]] == pytest.approx(
        [0.0 if name == "fp32" else ULP[name] for name in formats[:2]]
    )
    assert found["s3"] == pytest.approx(ULP[formats[2]] if rounded else 0.0)


def test_bias_is_rounded_only_for_formats_that_the_operation_takes(problem: Problem) -> None:
    reads = (*problem.links.reads[:2], Link("c2", 1, "bias", None, companion=True))
    operands = {**problem.statistics.operands, ("c2", 1): one()}
    prices = replace(problem.prices, casts={**problem.prices.casts, "bias": FREE})
    known = replace(
        problem,
        links=replace(problem.links, reads=reads),
        prices=prices,
        statistics=replace(problem.statistics, operands=operands),
    )
    for name in ("bf16", "fp16", "tf32", "e4m3"):
        plain = fixes_result(name)
        read = known.uniform() | {"c2": name}
        assert argument_format(reads[-1], name) == (name if plain else "fp32")
        assert known.variances(read)["c2"] == pytest.approx((1 + plain) * ULP[name])
        assert (("bias", name) in known.casts(read)) == plain
        assert not any(source == "bias" and kept != name for source, kept in known.casts(read))


FREE = dict.fromkeys(FORMATS, 0.0)


def test_raised_factors_multiply_all_that_a_site_is_blamed_for(problem: Problem) -> None:
    known = correlated(problem, (("c2", 0), BOTH[0], 0.5))
    raised = replace(known, raised={"c3": {"bf16": 9.0}, "s1": {"fp16": 4.0, "bf16": 7.0}})
    read = known.uniform() | {"c2": "bf16", "c3": "bf16"}
    before, after = known.variances(read), raised.variances(read)
    # two arguments, two intermediate results; the covariance by the root of both factors
    assert before["c3"] == pytest.approx(4.5 * ULP["bf16"])
    assert after["c3"] == pytest.approx((4 * 9 + 0.5 * 3) * ULP["bf16"])
    assert after["c2"] == pytest.approx((1 + 0.5 * 3) * ULP["bf16"])
    kept = known.uniform() | {"s1": "fp16"}
    assert raised.error(kept) == pytest.approx(2 * known.error(kept))
    assert raised.seconds(read) == known.seconds(read)
    other = known.uniform() | {"c3": "fp16"}
    assert raised.error(other) == known.error(other)


def test_result_follows_a_contraction_that_fixes_it(problem: Problem) -> None:
    legal = {"c1": "bf16", "c2": "fp32", "c3": "tf32", "s1": "bf16"}
    assert list(problem.violations(legal)) == []
    for stored in ("fp32", "fp16"):
        (reason,) = problem.violations(legal | {"s1": stored})
        assert reason == "s1 must be bf16, the format c1 returns"
    for free in ("fp32", "tf32", "e4m3"):
        assert not list(problem.violations(legal | {"c1": free, "s1": "fp16"}))
    (reason,) = problem.violations(legal | {"c2": "e5m2"})
    assert reason == "c2 may not be e5m2"


def test_uniform_assignment_names_every_site(problem: Problem) -> None:
    assert problem.uniform() == dict.fromkeys(("c1", "c2", "c3", "s1"), "fp32")
    assert set(problem.uniform("bf16").values()) == {"bf16"}


def test_formats_by_how_they_enter_and_leave_a_contraction() -> None:
    assert [name for name in FORMATS if fixes_result(name)] == ["fp32", "bf16", "fp16"]
    assert {name: entry_format(name) for name in FORMATS} == {
        **{name: name for name in FORMATS},
        "tf32": "fp32",
    }
