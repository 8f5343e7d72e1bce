"""The decision problem of one graph: options, times and error variances, and how they add up.

Both the solver and every score of a given assignment use these tables, so a plan, the autocast
policy and a brute-force search are judged by one model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from precision_compiler.formats import FORMATS, Format
from precision_compiler.links import Link, Links
from precision_compiler.statistics import Statistics

Table = Mapping[str, Mapping[str, float]]


def entry_format(name: str) -> str:
    """The storage format a contraction reads: tf32 is what the hardware makes of fp32 bits."""
    return "fp32" if FORMATS[name].dtype is None else name


def fixes_result(name: str) -> bool:
    """Whether an ATen contraction in this format returns its result in the same format.

    It does for every torch floating dtype with plain matmul support; scaled formats and tf32
    accumulate into whatever output format is asked for.
    """
    fmt = FORMATS[name]
    return fmt.dtype is not None and not fmt.scaled


def result_format(name: str) -> str | None:
    """The format a contraction's result comes in; None where any can be asked for."""
    if FORMATS[name].scaled:
        return None
    return name if fixes_result(name) else "fp32"


@dataclass(frozen=True)
class Prices:
    """Seconds per choice.

    Attributes:
        contractions: per contraction site and format.
        stores: per storage site and format: writing it and the reads of fused kernels.
        casts: per source node and format: one copy of the tensor in that format.
    """

    contractions: Table
    stores: Table
    casts: Table


@dataclass(frozen=True)
class Problem:
    """Everything that the assignment depends on.

    Attributes:
        links: sites and their contacts.
        options: formats each site may have, vetoed ones left out.
        prices: seconds.
        statistics: calibration.
    """

    links: Links
    options: Mapping[str, tuple[str, ...]]
    prices: Prices
    statistics: Statistics
    _cache: dict[tuple[object, str], float] = field(default_factory=dict, repr=False)

    def store_variance(self, store: str, name: str) -> float:
        """Error variance of keeping a tensor in a format."""
        return self._variance(("store", store), name)

    def link_variance(self, link: Link, name: str) -> float:
        """Error variance of one contraction argument rounded to a format."""
        return self._variance((link.contraction, link.argument), name)

    def internal_variance(self, contraction: str, name: str) -> float:
        """Error variance of a contraction's own intermediate results in a format."""
        return self._variance(("internal", contraction), name)

    def rounds_again(self, stored: str, entered: str) -> bool:
        """Whether reading a stored tensor in another format rounds it once more."""
        return not FORMATS[entered].refines(FORMATS[stored])

    def seconds(self, assignment: Mapping[str, str]) -> float:
        """Predicted time of an assignment: sites and the casts between them."""
        total = sum(
            self.prices.contractions[name][assignment[name]] for name in self.links.contractions
        )
        total += sum(self.prices.stores[name][assignment[name]] for name in self.links.stores)
        return total + sum(
            self.prices.casts[source][name] for source, name in self.casts(assignment)
        )

    def casts(self, assignment: Mapping[str, str]) -> set[tuple[str, str]]:
        """Copies (source node, format) that an assignment needs.

        One for every format a contraction reads a tensor in that it is not stored in, and one
        where a result is stored in another format than its contraction returns.
        """
        found = set()
        for link in self.links.reads:
            wanted = entry_format(assignment[link.contraction])
            stored = assignment[link.store] if link.store else "fp32"
            if wanted != stored:
                found.add((link.source, wanted))
        for store, writer in self.links.writer.items():
            returned, kept = result_format(assignment[writer]), assignment[store]
            if returned not in (None, kept):
                found.add((self.links.stores[store].node, kept))
        return found

    def variance(self, assignment: Mapping[str, str]) -> float:
        """Predicted variance of the probed gradient under an assignment."""
        return sum(self.variances(assignment).values())

    def variances(self, assignment: Mapping[str, str]) -> dict[str, float]:
        """The same per site; an argument's rounding belongs to the contraction that asks for it."""
        found = {
            store: self.store_variance(store, assignment[store]) for store in self.links.stores
        }
        for name in self.links.contractions:
            found[name] = self.internal_variance(name, assignment[name])
        for link in self.links.reads:
            chosen = assignment[link.contraction]
            if self.rounds_again(assignment[link.store] if link.store else "fp32", chosen):
                found[link.contraction] += self.link_variance(link, chosen)
        return found

    def error(self, assignment: Mapping[str, str]) -> float:
        """Predicted relative gradient error ``sqrt(variance) / ||G||``."""
        return float(self.variance(assignment) ** 0.5 / self.statistics.gradient_norm)

    def violations(self, assignment: Mapping[str, str]) -> Iterator[str]:
        """Sentences on what makes an assignment illegal; none for a legal one."""
        for name, allowed in self.options.items():
            if assignment[name] not in allowed:
                yield f"{name} may not be {assignment[name]}"
        for name, stores in self.links.results.items():
            chosen = assignment[name]
            for store in stores:
                if fixes_result(chosen) and chosen != "fp32" and assignment[store] != chosen:
                    yield f"{store} must be {chosen}, the format {name} returns"

    def uniform(self, name: str = "fp32") -> dict[str, str]:
        """The assignment of one format to every site."""
        return dict.fromkeys(self.options, name)

    def _variance(self, key: tuple[object, object], name: str) -> float:
        if name == "fp32":
            return 0.0
        slot = (key, name)
        if slot not in self._cache:
            self._cache[slot] = self._compute(key, FORMATS[name])
        return self._cache[slot]

    def _compute(self, key: tuple[object, object], fmt: Format) -> float:
        kind, item = key
        if kind == "store":
            return self.statistics.stores[str(item)].variance(fmt)
        if kind == "internal":
            inside = self.statistics.internals.get(str(item), ())
            return sum(sensitivity.variance(fmt) for sensitivity in inside)
        assert isinstance(item, int)
        return self.statistics.operands[str(kind), item].variance(fmt)


@dataclass(frozen=True)
class Solution:
    """An assignment and what is proven about it.

    Attributes:
        assignment: format by site.
        seconds: its predicted time.
        error: its predicted relative gradient error.
        bound: proven lower bound on the time of any legal assignment within the budget.
        gap: (seconds - bound) / seconds.
    """

    assignment: Mapping[str, str]
    seconds: float
    error: float
    bound: float
    gap: float
