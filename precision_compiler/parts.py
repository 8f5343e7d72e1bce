"""A decision problem in parts that touch nowhere but in the budget."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import networkx as nx

from precision_compiler.links import Link, Links
from precision_compiler.problem import Problem
from precision_compiler.statistics import Correlation

Place = tuple[str, str]  # ("site", name) or ("source", name)
_Item = TypeVar("_Item")


def split(problem: Problem) -> list[Problem]:
    """The connected parts of a problem, each a problem of its own, in the order of its sites.

    Seconds and variance of an assignment are the sums of those of its parts: what two sites have
    in common is a copy or a rounding of one source, a result, bits that one tensor has from
    another, or a correlation of two readers, and each of these connects them here.
    """
    touching: nx.Graph[Place] = nx.Graph()
    touching.add_nodes_from(("site", name) for name in problem.options)
    touching.add_edges_from(_contacts(problem))
    number = {
        place: index
        for index, places in enumerate(nx.connected_components(touching))
        for place in places
    }
    owner = {name: number["site", name] for name in problem.options}
    sites = _grouped((index, name) for name, index in owner.items())
    reads = _grouped((owner[link.contraction], link) for link in problem.links.reads)
    pairs = _grouped((owner[pair.first[0]], pair) for _, _, pair in problem.pairs)
    return [
        _part(problem, names, reads.get(index, []), pairs.get(index, []))
        for index, names in sites.items()
    ]


def _contacts(problem: Problem) -> Iterable[tuple[Place, Place]]:
    for link in problem.links.reads:
        source = ("source", link.source)
        yield ("site", link.contraction), source
        if link.store is not None:
            yield ("site", link.store), source
    for store, writer in problem.links.writer.items():
        yield ("site", store), ("site", writer)
        yield ("site", store), ("source", problem.links.stores[store].node)
    for store, sources in problem.statistics.exact.items():
        if store in problem.options:
            yield from ((("site", store), ("site", source)) for source in sources)
    for first, second, _ in problem.pairs:
        yield ("site", first.contraction), ("site", second.contraction)


def _grouped(pairs: Iterable[tuple[int, _Item]]) -> dict[int, list[_Item]]:
    found: dict[int, list[_Item]] = defaultdict(list)
    for key, item in pairs:
        found[key].append(item)
    return found


def _part(
    problem: Problem, names: list[str], reads: list[Link], pairs: list[Correlation]
) -> Problem:
    links, known = problem.links, problem.statistics

    def mine(table: Mapping[str, _Item]) -> dict[str, _Item]:
        return {name: table[name] for name in names if name in table}

    return replace(
        problem,
        links=Links(
            mine(links.contractions), mine(links.stores), tuple(reads), mine(links.results)
        ),
        options=mine(problem.options),
        statistics=replace(known, exact=mine(known.exact), correlations=tuple(pairs)),
    )
