"""Statistics of several batches: means of their variances, and of nothing that does not match."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from precision_compiler.formats import FORMATS
from precision_compiler.observation import sensitivity_of
from precision_compiler.statistics import (
    Accumulated,
    Correlation,
    Measured,
    Sensitivity,
    Statistics,
    averaged,
)


def one_batch(seed: int) -> Statistics:
    """Something of everything that is averaged, for batches of the same graph."""
    dice = np.random.default_rng(seed)

    def seen(low: int = -8) -> Sensitivity:
        values = np.exp2(dice.uniform(low, 2, 200)) * dice.choice([-1, 1], 200)
        rows = torch.tensor(np.stack([values, dice.normal(size=200)]), dtype=torch.float32)
        return sensitivity_of(rows[0], rows[1], ["bf16", "e4m3"])

    def pair(first: int, second: int) -> Correlation:
        edges = ("c", first), ("c", second)
        return Correlation(*edges, dice.normal(size=255), {"e4m3": dice.normal()}, dice.uniform())

    return Statistics(
        {"s": seen()},
        {("c", 0): seen(), ("c", 1): seen()},
        {"c": (seen(), seen(-20))},
        (pair(0, 1), pair(0, 2)),
        {"both": ("s",), f"only {seed}": ("s",)},
        {"r": seen()},
        {("c", "e4m3"): Accumulated(dice.uniform(), dice.uniform())},
        {"sum": dice.uniform()},
        gradient_norm=dice.uniform(),
        loss=dice.uniform(),
    )


PLACES: list[Callable[[Statistics], Sensitivity]] = [
    lambda stats: stats.stores["s"],
    lambda stats: stats.operands["c", 1],
    lambda stats: stats.internals["c"][1],
    lambda stats: stats.ranges["r"],
]


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3"])
def test_average_of_batches_has_the_mean_of_their_variances(name: str) -> None:
    one, other = one_batch(1), one_batch(2)
    fmt, both = FORMATS[name], averaged([one, other])
    for pick in PLACES:
        found, parts = pick(both), [pick(one), pick(other)]
        assert found.variance(fmt) == pytest.approx(sum(p.variance(fmt) for p in parts) / 2)
        assert found.amax == max(part.amax for part in parts)
        assert np.array_equal(found.count, parts[0].count + parts[1].count)


def test_average_keeps_means_and_what_holds_for_all() -> None:
    one, other = one_batch(1), one_batch(2)
    both = averaged([one, other])
    assert both.gradient_norm == pytest.approx((one.gradient_norm + other.gradient_norm) / 2)
    assert both.loss == pytest.approx((one.loss + other.loss) / 2)
    sums = [stats.accumulations["c", "e4m3"] for stats in (one, other, both)]
    assert sums[2].variance == pytest.approx((sums[0].variance + sums[1].variance) / 2)
    assert sums[2].terms == max(sums[0].terms, sums[1].terms)
    assert both.sums["sum"] == max(one.sums["sum"], other.sums["sum"])
    assert both.exact == {"both": ("s",)}
    assert both.batches == 2
    assert averaged([one]) is one


def test_average_of_errors_that_agree_on_one_batch_is_the_mean_of_both_effects() -> None:
    empty = np.zeros((3, 255))
    found = [
        Sensitivity(empty, 1.0, measured={"e4m3": Measured(variance, signed)})
        for variance, signed in [(1.0, 1.0), (3.0, 99.0)]
    ]
    stats = averaged([Statistics({"s": one}, {}, {}) for one in found])
    assert stats.stores["s"].measured == {"e4m3": Measured(2.0, 50.0)}
    assert stats.stores["s"].is_coherent(FORMATS["e4m3"])


@pytest.mark.parametrize("turned", [False, True])
def test_average_pairs_the_same_readers_whatever_order_they_were_found_in(turned: bool) -> None:
    """Batches of other shapes are cut into other chunks, so their pairs come in another order."""
    one, other = one_batch(1), one_batch(2)
    pairs = other.correlations[::-1] if turned else other.correlations
    both = averaged([one, replace(other, correlations=pairs)])
    known = {(pair.first, pair.second): pair for pair in other.correlations}
    for found, first in zip(both.correlations, one.correlations, strict=True):
        second = known[found.first, found.second]
        for name in ("bf16", "e4m3"):
            fmt = FORMATS[name]
            expected = (first.covariance(fmt) + second.covariance(fmt)) / 2
            assert found.covariance(fmt) == pytest.approx(expected)


def test_sites_that_another_batch_does_not_have_keep_what_the_first_one_found() -> None:
    """A batch of few elements stores fewer tensors; what it alone stores is not asked for."""
    one, other = one_batch(1), one_batch(2)
    lacking = Statistics({"t": other.stores["s"]}, {}, {}, gradient_norm=2.0)
    both = averaged([one, lacking])
    for pick in PLACES:
        assert pick(both).variance(FORMATS["bf16"]) == pick(one).variance(FORMATS["bf16"])
    assert set(both.stores) == {"s"}
    assert [pair.amax for pair in both.correlations] == [pair.amax for pair in one.correlations]
    assert (both.exact, both.sums, both.batches) == ({}, one.sums, 2)
    assert both.gradient_norm == pytest.approx(one.gradient_norm / 2 + 1.0)
