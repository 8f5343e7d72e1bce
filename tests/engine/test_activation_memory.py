"""What is kept for the backward pass: predicted, limited, and the limit explained."""

from dataclasses import replace
from functools import cache
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_compiler.budget import Budget
from precision_compiler.compiler import decide
from precision_compiler.errors import BudgetError
from precision_compiler.problem import Prices, Problem, Saved
from precision_compiler.sizes import bytes_of, readable_bytes
from precision_compiler.solver import solve
from tests.helpers import machine
from tests.models import captured
from tests.random_problems import legal_assignments, problems


@cache
def problem() -> Problem:
    return decide(captured("gpt"), machine(), Budget.parse(1.0)).unit.problem


@pytest.mark.parametrize(
    ("text", "size"),
    [("40GB", 4e10), ("1.5 KiB", 1536), (1e6, 1e6), ("2e3", 2000), (" 7 mb ", 7e6), (12, 12)],
)
def test_sizes_are_read(text: float | str, size: float) -> None:
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["40 gigs", "-1GB", "0", "GB", "nan", "1e999", "", "1.2.3MB"])
def test_what_is_no_size_is_an_error(text: str) -> None:
    with pytest.raises(BudgetError, match="is no size: give bytes"):
        bytes_of(text)


def test_sizes_are_written_for_people() -> None:
    assert [readable_bytes(size) for size in (12, 4e10, 1.234e6)] == [
        "12 bytes",
        "40 GB",
        "1.23 MB",
    ]


def test_narrow_storage_keeps_less() -> None:
    found = problem()
    wide, narrow = found.uniform(), dict(found.uniform())
    narrow |= {name: "bf16" for name in found.links.stores if "bf16" in found.options[name]}
    assert found.activation_bytes(narrow) < found.activation_bytes(wide)
    for chosen in (wide, narrow):
        assert 0 < found.activation_bytes(chosen) <= found.stored_bytes(chosen)


def test_what_only_narrow_products_read_is_kept_as_they_read_it() -> None:
    found = problem()
    wide = found.uniform()
    products = dict(wide) | {
        name: "bf16" for name in found.links.contractions if "bf16" in found.options[name]
    }
    assert found.activation_bytes(products) < found.activation_bytes(wide)
    assert found.stored_bytes(products) == found.stored_bytes(wide)


def test_a_limit_is_kept_and_costs_time() -> None:
    free = solve(problem(), 1.0)
    least = solve(replace(problem(), prices=no_prices(problem())), 1.0)
    most = 0.9 * problem().stored_bytes(free.assignment)
    if problem().stored_bytes(least.assignment) > most:
        pytest.fail("the case does not show what it is for")
    limited = solve(replace(problem(), most_bytes=most), 1.0)
    assert problem().stored_bytes(limited.assignment) <= most * (1 + 1e-6)
    assert limited.seconds >= free.bound


def no_prices(found: Problem) -> Prices:
    """Prices of nothing but the bytes that are kept."""
    prices = found.prices
    sizes = found.saved.elements
    stores = {
        name: {fmt: sizes.get(name, 0) * (4.0 if fmt == "fp32" else 2.0) for fmt in row}
        for name, row in prices.stores.items()
    }
    contractions = {name: dict.fromkeys(row, 0.0) for name, row in prices.contractions.items()}
    casts = {name: dict.fromkeys(row, 0.0) for name, row in prices.casts.items()}
    return replace(prices, stores=stores, contractions=contractions, casts=casts, fixed=0.0)


def test_too_little_memory_says_what_would_do() -> None:
    with pytest.raises(BudgetError, match=r"narrowest format it is .*; allow more memory"):
        solve(replace(problem(), most_bytes=1000.0), 1.0)


@settings(max_examples=60, deadline=None)
@given(problems(), st.lists(st.integers(1, 9), min_size=3, max_size=3), st.floats(0.3, 1.0))
def test_the_limited_optimum_is_that_of_brute_force(
    found: Problem, sizes: list[int], share: float
) -> None:
    elements = dict(zip(found.links.stores, sizes, strict=False))
    full = 4.0 * sum(elements.values()) + 1.0
    limited = replace(
        found, saved=Saved(elements, frozenset(), 1.0), most_bytes=share * full if elements else inf
    )
    budget = 10.0
    legal = [a for a in legal_assignments(limited) if limited.error(a) <= budget]
    if not legal:
        with pytest.raises(BudgetError):
            solve(limited, budget)
        return
    best = min(map(limited.seconds, legal))
    assert solve(limited, budget, 0.0).seconds == pytest.approx(best, rel=1e-6, abs=1e-12)
