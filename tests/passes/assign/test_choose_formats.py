"""The solver against every assignment there is, on problems small enough to list them."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precision_compiler.errors import BudgetError
from precision_compiler.links import Link, Links
from precision_compiler.passes.assign.choose_formats import ChooseFormats, solve
from precision_compiler.pipeline import Unit
from precision_compiler.problem import Prices, Problem, entry_format, fixes_result
from precision_compiler.sites import Site
from precision_compiler.statistics import Sensitivity, Statistics
from tests.helpers import bare_unit

CONTRACTION_FORMATS = ("fp32", "tf32", "bf16", "fp16", "e4m3")
STORE_FORMATS = ("fp32", "bf16", "fp16")
ALL_FORMATS = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")
GAP = 1e-3


def contraction(name: str) -> Site:
    return Site(name, "contraction", "fprop", "mm", name, "mm[]", (4, 4))


def storage(name: str) -> Site:
    return Site(name, "storage", "store", "mm", name, "mm", (4, 4))


def sensitivity(size: float) -> Sensitivity:
    """All weight in the binade of 1; a size of 0 is a tensor that nothing depends on."""
    weight = np.zeros(255)
    weight[126] = size
    return Sensitivity(weight, 1.5)


sizes = st.sampled_from([0.0, 1e-12, 0.01, 0.3, 1.0, 5.0, 40.0, 1e12])
seconds = st.sampled_from([0.0, 1e-6, 2e-6, 3e-6, 5e-6, 1.7e-5])


def table(draw: st.DrawFn, formats: tuple[str, ...]) -> dict[str, float]:
    return {name: draw(seconds) for name in formats}


def chosen_options(draw: st.DrawFn, formats: tuple[str, ...]) -> tuple[str, ...]:
    """A subset in the table's order, float32 nearly always among it as nothing vetoes it."""
    kept = [name for name in formats[1:] if draw(st.booleans())]
    return ("fp32", *kept)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to four contractions and four stored tensors, linked at random."""
    contractions = {f"c{i}": contraction(f"c{i}") for i in range(draw(st.integers(1, 3)))}
    stores = {f"s{i}": storage(f"s{i}") for i in range(draw(st.integers(0, 3)))}
    inputs = ["p0", "p1"]
    reads = [
        Link(name, argument, source, source if source in stores else None)
        for name in contractions
        for argument in range(draw(st.integers(1, 2)))
        for source in [draw(st.sampled_from([*stores, *inputs]))]
    ]
    free = list(stores)
    results: dict[str, tuple[str, ...]] = {}
    for name in contractions:
        written = [store for store in free if draw(st.integers(0, 2)) == 0]
        free = [store for store in free if store not in written]
        results[name] = tuple(written)
    links = Links(contractions, stores, tuple(reads), results)
    options = {name: chosen_options(draw, CONTRACTION_FORMATS) for name in contractions}
    options |= {name: chosen_options(draw, STORE_FORMATS) for name in stores}
    prices = Prices(
        {name: table(draw, CONTRACTION_FORMATS) for name in contractions},
        {name: table(draw, STORE_FORMATS) for name in stores},
        {source: table(draw, ALL_FORMATS) for source in [*stores, *inputs]},
    )
    statistics = Statistics(
        {name: sensitivity(draw(sizes)) for name in stores},
        {(link.contraction, link.argument): sensitivity(draw(sizes)) for link in reads},
        {name: (sensitivity(draw(sizes)),) for name in contractions},
        gradient_norm=2.0,
        loss=1.0,
    )
    return Problem(links, options, prices, statistics)


def legal_assignments(problem: Problem) -> Iterator[dict[str, str]]:
    names = list(problem.options)
    for formats in itertools.product(*problem.options.values()):
        assignment = dict(zip(names, formats, strict=True))
        if not any(problem.violations(assignment)):
            yield assignment


def plain_seconds(problem: Problem, assignment: Mapping[str, str]) -> float:
    """The cost model written out once more, as slowly as it reads."""
    total = 0.0
    for name in problem.links.contractions:
        total += problem.prices.contractions[name][assignment[name]]
    for name in problem.links.stores:
        total += problem.prices.stores[name][assignment[name]]
    paid: set[tuple[str, str]] = set()
    for link in problem.links.reads:
        kept = "fp32" if link.store is None else assignment[link.store]
        wanted = entry_format(assignment[link.contraction])
        if kept != wanted and (link.source, wanted) not in paid:
            paid.add((link.source, wanted))
            total += problem.prices.casts[link.source][wanted]
    for name, written in problem.links.results.items():
        returned = {"tf32": "fp32", "e4m3": None}.get(assignment[name], assignment[name])
        for store in written:
            kept = assignment[store]
            if returned not in (None, kept) and (store, kept) not in paid:
                paid.add((store, kept))
                total += problem.prices.casts[store][kept]
    return total


many = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@many
@given(problems(), st.sampled_from([0.0, 1e-4, 1e-3, 4e-3, 0.02, 0.3, float("inf")]))
def test_solver_finds_what_listing_every_assignment_finds(problem: Problem, budget: float) -> None:
    fitting = [
        (plain_seconds(problem, assignment), assignment)
        for assignment in legal_assignments(problem)
        if problem.error(assignment) <= budget
    ]
    best = min(seconds for seconds, _ in fitting)  # float32 everywhere always fits
    solution = solve(problem, budget, GAP)
    assert not list(problem.violations(solution.assignment))
    assert solution.error == problem.error(solution.assignment)
    assert solution.error <= budget * (1 + 1e-5)
    assert solution.seconds == pytest.approx(plain_seconds(problem, solution.assignment), abs=1e-15)
    assert solution.bound <= best * (1 + 1e-6) + 1e-12
    assert solution.bound <= solution.seconds
    assert solution.seconds <= best * (1 + 2 * GAP) + 1e-10
    assert solution.gap <= 2 * GAP or solution.seconds <= best + 1e-10


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problems())
def test_the_optimum_fits_a_budget_of_exactly_its_own_error(problem: Problem) -> None:
    for assignment in itertools.islice(legal_assignments(problem), 0, None, 97):
        solution = solve(problem, problem.error(assignment), GAP)
        assert solution.seconds <= plain_seconds(problem, assignment) * (1 + 2 * GAP) + 1e-10


def small_problem() -> Problem:
    """One contraction that reads a parameter and writes a stored tensor."""
    links = Links(
        {"c": contraction("c")}, {"s": storage("s")}, (Link("c", 0, "p", None),), {"c": ("s",)}
    )
    prices = Prices(
        {"c": {"fp32": 9e-6, "bf16": 1e-6}},
        {"s": {"fp32": 2e-6, "bf16": 1e-6}},
        dict.fromkeys(("p", "s"), dict.fromkeys(ALL_FORMATS, 1e-6)),
    )
    statistics = Statistics({"s": sensitivity(1.0)}, {("c", 0): sensitivity(1.0)}, {}, 1.0, 1.0)
    return Problem(links, {"c": ("fp32", "bf16"), "s": ("fp32", "bf16")}, prices, statistics)


def test_zero_budget_keeps_float32_everywhere() -> None:
    solution = solve(small_problem(), 0.0)
    assert solution.assignment == {"c": "fp32", "s": "fp32"}
    assert solution.error == 0.0
    assert solution.bound == pytest.approx(solution.seconds)


def test_a_wide_budget_takes_the_fast_format_and_its_result_follows() -> None:
    assert fixes_result("bf16")
    assert solve(small_problem(), 1.0).assignment == {"c": "bf16", "s": "bf16"}


def test_a_budget_that_nothing_fits_is_an_error() -> None:
    vetoed = replace(small_problem(), options={"c": ("bf16",), "s": ("bf16",)})
    with pytest.raises(BudgetError, match="within 1e-09") as caught:
        solve(vetoed, 1e-9)
    assert "\n" not in str(caught.value)


def test_contradicting_vetoes_are_an_error_as_well() -> None:
    stuck = replace(small_problem(), options={"c": ("bf16",), "s": ("fp32",)})
    with pytest.raises(BudgetError):
        solve(stuck, 1.0)


def test_pass_keeps_the_solution_and_its_assignment() -> None:
    unit = bare_unit(small_problem(), limit=1.0)
    assert not ChooseFormats().run(unit)
    assert unit.solution is not None
    assert unit.assignment == dict(unit.solution.assignment) == {"c": "bf16", "s": "bf16"}


def test_pass_honours_the_limit_of_the_budget() -> None:
    unit: Unit = bare_unit(small_problem(), limit=0.0)
    ChooseFormats().run(unit)
    assert unit.assignment == {"c": "fp32", "s": "fp32"}
