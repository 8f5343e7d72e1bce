"""Random decision problems, few choices each, and their time worked out slowly."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import cos, radians
from typing import Any

import numpy as np
from hypothesis import strategies as st

from precision_compiler.links import Link, Links
from precision_compiler.problem import Prices, Problem, entry_format
from precision_compiler.sites import Site
from precision_compiler.statistics import (
    METRICS,
    Accumulated,
    Correlation,
    Edge,
    Sensitivity,
    Statistics,
)

CONTRACTION_FORMATS = ("fp32", "tf32", "bf16", "fp16", "e4m3")
STORE_FORMATS = ("fp32", "bf16", "fp16")
ALL_FORMATS = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")


def contraction(name: str) -> Site:
    return Site(name, "contraction", "fprop", "mm", name, "mm[]", (4, 4))


def storage(name: str) -> Site:
    return Site(name, "storage", "store", "mm", name, "mm", (4, 4))


def weight(size: float) -> np.ndarray:
    """All weight in the binade of 1."""
    found = np.zeros(255)
    found[126] = size
    return found


def sensitivity(size: float) -> Sensitivity:
    """Weight in the binade of 1; a size of 0 is a tensor that nothing depends on."""
    return Sensitivity(np.stack([weight(size)] * len(METRICS)), 1.5)


class Described(Problem):
    """A problem that a failing test can print."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(self.description)

    @property
    def description(self) -> str:
        """All that makes a difference."""
        known = self.statistics
        pairs = [(pair.first, pair.second, pair.weight[126]) for pair in known.correlations]
        return (
            f"{self.links.reads} {self.links.results} {self.options} {self.prices} pairs {pairs} "
            f"operands { {key: seen.weight[0, 126] for key, seen in known.operands.items()} } "
            f"stores { {key: seen.weight[0, 126] for key, seen in known.stores.items()} } "
            f"internals { {key: seen[0].weight[0, 126] for key, seen in known.internals.items()} } "
            f"exact {known.exact} sums {known.accumulations} raised {self.raised}"
        )


sizes = st.sampled_from([0.3, 1.0, 5.0, 1.0, 40.0, 0.01, 1e-8, 0.0])
own_sizes = st.sampled_from([0.3, 1.0, 5.0, 0.0, 1e12])  # of what nothing goes together with
directions = st.sampled_from([0, 170, 0, 30, 60, 87, 120])
rarely = st.integers(0, 2).map(lambda number: number == 0)
factors = st.sampled_from([0.5, 2.25, 9.0])
seconds = st.sampled_from([0.0, 1e-6, 2e-6, 3e-6, 5e-6, 1.7e-5])


def table(draw: st.DrawFn, formats: Sequence[str], wide: float = 0.0) -> dict[str, float]:
    """Seconds by format, float32 taking ``wide`` more."""
    return {name: draw(seconds) + (wide if name == "fp32" else 0.0) for name in formats}


def chosen_options(draw: st.DrawFn, formats: Sequence[str], most: int = 3) -> tuple[str, ...]:
    """Float32, which nothing vetoes, and some others, ``most`` in all."""
    others = st.lists(st.sampled_from(formats[1:]), max_size=most - 1, unique=True)
    return ("fp32", *draw(others))


def correlations(
    draw: st.DrawFn, reads: tuple[Link, ...], operands: Mapping[Edge, Sensitivity]
) -> Iterator[Correlation]:
    """For every two readers of one tensor, the cosine of their effects: 1 to nearly -1."""
    turned = [(draw(directions), draw(directions)) for _ in reads]
    for (one, here), (other, there) in itertools.combinations(zip(reads, turned, strict=True), 2):
        if one.source == other.source:
            first, second = (one.contraction, one.argument), (other.contraction, other.argument)
            scale = float(operands[first].weight[0, 126] * operands[second].weight[0, 126]) ** 0.5
            shared, scaled = (scale * cos(radians(a - b)) for a, b in zip(here, there, strict=True))
            measured = {"e4m3": scaled * 2.0**-6 / 12} if draw(st.booleans()) else {}
            yield Correlation(first, second, weight(shared), measured, 1.5)


@st.composite
def problems(
    draw: st.DrawFn, most_stores: int = 3, most_contractions: int = 3, most_options: int = 3
) -> Problem:
    """Some contractions and stored tensors, linked at random.

    Without stored tensors all contractions read one parameter.
    """
    contractions = {
        f"c{i}": contraction(f"c{i}") for i in range(draw(st.integers(1, most_contractions)))
    }
    stores = {f"s{i}": storage(f"s{i}") for i in range(draw(st.integers(0, most_stores)))}
    inputs = ["p"]
    reads = tuple(
        Link(name, argument, source, source if source in stores else None, draw(rarely))
        for name in contractions
        for argument in range(draw(st.integers(1, 2)))
        for source in [draw(st.sampled_from([*stores, *inputs]))]
    )
    free = list(stores)
    results: dict[str, tuple[str, ...]] = {}
    for name in contractions:
        written = [store for store in free[:1] if draw(rarely)]
        free = free[len(written) :]
        results[name] = tuple(written)
    exact = {
        store: tuple(sources)
        for store in free
        if (sources := [other for other in stores if other < store and draw(st.booleans())])
    }
    most = most_options
    options = {name: chosen_options(draw, CONTRACTION_FORMATS, most) for name in contractions}
    options |= {name: chosen_options(draw, STORE_FORMATS, most) for name in stores}
    prices = Prices(
        {name: table(draw, CONTRACTION_FORMATS, 1e-5) for name in contractions},
        {name: table(draw, STORE_FORMATS, 2e-6) for name in stores},
        {source: table(draw, ALL_FORMATS) for source in [*stores, *inputs]},
    )
    operands = {(link.contraction, link.argument): sensitivity(draw(sizes)) for link in reads}
    statistics = Statistics(
        {name: sensitivity(draw(own_sizes)) for name in stores},
        operands,
        {name: (sensitivity(draw(own_sizes)),) for name in contractions if draw(rarely)},
        tuple(correlations(draw, reads, operands)),
        exact,
        accumulations={
            (name, "e4m3"): Accumulated(1e-3, 1.0) for name in contractions if draw(rarely)
        },
    )
    raised = {
        name: {fmt: draw(factors) for fmt in formats if draw(rarely)}
        for name, formats in options.items()
        if draw(rarely)
    }
    links = Links(contractions, stores, reads, results)
    return Described(links, options, prices, statistics, raised)


def side_by_side(*parts: Problem) -> Problem:
    """Problems that share nothing but a budget; the names of each get its number in front."""
    known = [part.statistics for part in parts]

    def merged(tables: Sequence[Mapping[Any, Any]]) -> dict[Any, Any]:
        return {
            _numbered(number, key): value
            for number, table in enumerate(tables)
            for key, value in table.items()
        }

    links = Links(
        merged([part.links.contractions for part in parts]),
        {
            name: storage(name)
            for number, part in enumerate(parts)
            for name in (_numbered(number, store) for store in part.links.stores)
        },
        tuple(
            Link(
                _numbered(number, link.contraction), link.argument,
                _numbered(number, link.source), link.store and _numbered(number, link.store),
                link.companion,
            )
            for number, part in enumerate(parts)
            for link in part.links.reads
        ),
        _renamed([part.links.results for part in parts]),
    )  # fmt: skip
    prices = Prices(
        merged([part.prices.contractions for part in parts]),
        merged([part.prices.stores for part in parts]),
        merged([part.prices.casts for part in parts]),
    )
    pairs = tuple(
        replace(pair, first=_numbered(number, pair.first), second=_numbered(number, pair.second))
        for number, each in enumerate(known)
        for pair in each.correlations
    )
    statistics = Statistics(
        merged([each.stores for each in known]),
        merged([each.operands for each in known]),
        merged([each.internals for each in known]),
        pairs,
        _renamed([each.exact for each in known]),
        accumulations=merged([each.accumulations for each in known]),
    )
    options = merged([part.options for part in parts])
    return Described(links, options, prices, statistics, merged([part.raised for part in parts]))


def _numbered(number: int, key: Any) -> Any:
    """A name, or the name that a pair starts with, with a number in front."""
    return f"{number}{key}" if isinstance(key, str) else (f"{number}{key[0]}", key[1])


def _renamed(tables: Sequence[Mapping[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    return {
        f"{number}{key}": tuple(f"{number}{value}" for value in values)
        for number, table in enumerate(tables)
        for key, values in table.items()
    }


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
        if link.companion and wanted == "e4m3":
            wanted = "fp32"
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


def readers(*effects: float) -> Problem:
    """Contractions that read one parameter; errors of it move the gradient by these, in one sum."""
    names = [f"c{i}" for i in range(len(effects))]
    links = Links(
        {name: contraction(name) for name in names},
        {},
        tuple(Link(name, 0, "p", None) for name in names),
        {name: () for name in names},
    )
    prices = Prices(
        {name: {"fp32": 9e-6, "bf16": 1e-6} for name in names},
        {},
        {"p": dict.fromkeys(ALL_FORMATS, 1e-6)},
    )
    by_edge: dict[Edge, float] = {(name, 0): h for name, h in zip(names, effects, strict=True)}
    pairs = tuple(
        Correlation(one, other, weight(by_edge[one] * by_edge[other]), {}, 1.5)
        for one, other in itertools.combinations(by_edge, 2)
    )
    operands = {edge: sensitivity(h * h) for edge, h in by_edge.items()}
    options = dict.fromkeys(names, ("fp32", "bf16"))
    return Problem(links, options, prices, Statistics({}, operands, {}, pairs))


ROUNDING = (2.0**-14 / 12) ** 0.5  # of a number between 1 and 2 to bf16
