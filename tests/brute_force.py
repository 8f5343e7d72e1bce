"""Every assignment of a problem at once, in arrays: rules of time and error once more."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf

import numpy as np

from precision_compiler.formats import CHOICES
from precision_compiler.problem import (
    Problem,
    argument_format,
    entry_format,
    fixes_result,
    result_format,
)

Mask = np.ndarray


@dataclass(frozen=True)
class Table:
    """All assignments of a problem.

    Attributes:
        chosen: by site and format, which assignments have it.
        seconds: of each assignment.
        variance: of each.
        legal: which are.
    """

    chosen: Mapping[str, Mapping[str, Mask]]
    seconds: np.ndarray
    variance: np.ndarray
    legal: Mask

    def fastest(self, limit: float) -> float:
        """The least time of a legal assignment of at most some variance; infinite if none is."""
        fits = self.legal & (self.variance <= limit * (1 + 1e-9))
        return float(self.seconds[fits].min()) if fits.any() else inf


def every_assignment(problem: Problem) -> Table:
    """All of them; their number is the product of the sites' options."""
    sizes = [len(formats) for formats in problem.options.values()]
    numbers = np.unravel_index(np.arange(int(np.prod(sizes))), sizes)
    chosen = {
        name: {fmt: number == place for place, fmt in enumerate(formats)}
        for (name, formats), number in zip(problem.options.items(), numbers, strict=True)
    }
    seconds, variance = _seconds(problem, chosen), _variance(problem, chosen)
    return Table(chosen, seconds, variance, _legal(problem, chosen))


def _total(table: Mapping[str, Mask], values: Mapping[str, float]) -> np.ndarray:
    return np.asarray(np.sum([mask * values[fmt] for fmt, mask in table.items()], axis=0))


def _stored(chosen: Mapping[str, Mapping[str, Mask]], store: str | None) -> Mapping[str, Mask]:
    if store is not None:
        return chosen[store]
    size = len(next(iter(next(iter(chosen.values())).values())))
    return {"fp32": np.ones(size, dtype=bool)}


def _seconds(problem: Problem, chosen: Mapping[str, Mapping[str, Mask]]) -> np.ndarray:
    prices, links = problem.prices, problem.links
    parts = [_total(chosen[name], prices.contractions[name]) for name in links.contractions]
    parts += [_total(chosen[name], prices.stores[name]) for name in links.stores]
    copies: dict[tuple[str, str], Mask] = {}

    def need(source: str, fmt: str, mask: Mask) -> None:
        copies[source, fmt] = copies.get((source, fmt), np.zeros_like(mask)) | mask

    for link in links.reads:
        kept = _stored(chosen, link.store)
        for fmt, mask in chosen[link.contraction].items():
            wanted = entry_format(argument_format(link, fmt))
            need(link.source, wanted, mask & ~kept.get(wanted, np.zeros_like(mask)))
    for store, writer in links.writer.items():
        for kept_format, mask in chosen[store].items():
            for fmt, written in chosen[writer].items():
                if result_format(fmt) not in (None, kept_format):
                    need(links.stores[store].node, kept_format, mask & written)
    parts += [mask * prices.casts[source][fmt] for (source, fmt), mask in copies.items()]
    return np.asarray(np.sum(parts, axis=0) + prices.fixed)


def _variance(problem: Problem, chosen: Mapping[str, Mapping[str, Mask]]) -> np.ndarray:
    links = problem.links
    parts: list[np.ndarray] = []
    rounding: dict[tuple[str, int, str], Mask] = {}
    for store in links.stores:
        for fmt, mask in chosen[store].items():
            sources = problem.exact_sources(store)
            finer = [
                found
                for source in sources
                for kept, found in chosen[source].items()
                if problem.rounds_again(kept, fmt)
            ]
            rounds = np.any(finer, axis=0) if finer else np.zeros_like(mask)
            counted = mask & (rounds if sources else True)
            parts.append(counted * problem.store_variance(store, fmt))
    for name in links.contractions:
        parts.append(_total(chosen[name], {f: problem.internal_variance(name, f) for f in CHOICES}))
    for link in links.reads:
        for name, mask in chosen[link.contraction].items():
            fmt = argument_format(link, name)
            kept = _stored(chosen, link.store)
            finer = [found for stored, found in kept.items() if problem.rounds_again(stored, fmt)]
            rounds = mask & (np.any(finer, axis=0) if finer else np.zeros_like(mask))
            key = link.contraction, link.argument, fmt
            rounding[key] = rounding.get(key, np.zeros_like(mask)) | rounds
            parts.append(rounds * problem.link_variance(link, fmt))
    for first, second, pair in problem.pairs:
        for fmt in CHOICES:
            masks = [rounding.get((*edge, fmt)) for edge in (pair.first, pair.second)]
            if fmt != "fp32" and masks[0] is not None and masks[1] is not None:
                parts.append(masks[0] * masks[1] * problem.pair_variance(first, second, pair, fmt))
    return np.asarray(np.sum(parts, axis=0))


def _legal(problem: Problem, chosen: Mapping[str, Mapping[str, Mask]]) -> Mask:
    legal = np.ones_like(next(iter(next(iter(chosen.values())).values())))
    for name, stores in problem.links.results.items():
        for fmt, mask in chosen[name].items():
            for store in stores if fixes_result(fmt) and fmt != "fp32" else ():
                legal &= ~mask | chosen[store].get(fmt, np.zeros_like(mask))
    return legal
