"""The decision problem of one graph: options, times and error variances, and how they add up.

Both the solver and every score of a given assignment use these tables, so a plan, the autocast
policy and a brute-force search are judged by one model.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf

from precision_compiler.errors import InternalError
from precision_compiler.flips import flip_variance, steepest
from precision_compiler.formats import CHOICES
from precision_compiler.links import Link, Links
from precision_compiler.sizes import readable_bytes
from precision_compiler.statistics import METRICS, Correlation, Edge, Sensitivity, Statistics

COMPARED = METRICS.index("compared")

PAIR_COUNTS = 0.1
"""Correlation of two readers of a tensor from which it is part of the problem."""

_GAUGE = CHOICES["bf16"]

Table = Mapping[str, Mapping[str, float]]


def entry_format(name: str) -> str:
    """The storage format a contraction reads: tf32 is what the hardware makes of fp32 bits."""
    return "fp32" if CHOICES[name].bits == CHOICES["fp32"].bits else name


def fixes_result(name: str) -> bool:
    """Whether an ATen contraction in this format returns its result in the same format.

    It does for every torch floating dtype with plain matmul support; scaled formats and tf32
    accumulate into whatever output format is asked for.
    """
    fmt = CHOICES[name]
    return fmt.dtype is not None and not fmt.scaled


def argument_format(link: Link, name: str) -> str:
    """The format an argument is rounded to for a contraction in a format."""
    return "fp32" if link.companion and not fixes_result(name) else name


def result_format(name: str) -> str | None:
    """The format a contraction's result comes in; None where any can be asked for."""
    if CHOICES[name].scaled:
        return None
    return name if fixes_result(name) else "fp32"


@dataclass(frozen=True)
class Prices:
    """Seconds per choice.

    Attributes:
        contractions: per contraction site and format.
        stores: per storage site and format: writing it and the reads of fused kernels.
        casts: per source node and format: one copy of the tensor in that format.
        fixed: everything that formats do not change.
    """

    contractions: Table
    stores: Table
    casts: Table
    fixed: float = 0.0


@dataclass(frozen=True)
class Saved:
    """Tensors that are kept from the forward to the backward pass.

    Attributes:
        elements: number of elements, by storage site.
        fused: storage sites that fused kernels of the backward pass read, as they are stored.
        other: bytes of kept tensors that are no site, parameters left out.
    """

    elements: Mapping[str, int]
    fused: frozenset[str]
    other: float


@dataclass(frozen=True)
class Problem:
    """Everything that the assignment depends on.

    Attributes:
        links: sites and their contacts.
        options: formats each site may have, vetoed ones left out.
        prices: seconds.
        statistics: calibration.
        raised: by site and format, factors on predicted variances that verification found to be
            larger.
        saved: what the backward pass needs of the forward pass.
        most_bytes: limit on ``stored_bytes``.
        slope: of the squared gradient error that flipped choices cause, by the variance of the
            numbers that choose: a straight line from 0, see ``flip_slope``.
    """

    links: Links
    options: Mapping[str, tuple[str, ...]]
    prices: Prices
    statistics: Statistics
    raised: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    saved: "Saved" = field(default_factory=lambda: Saved({}, frozenset(), 0.0))
    most_bytes: float = inf
    slope: float = 0.0
    _cache: dict[tuple[object, str, int], float] = field(default_factory=dict, repr=False)

    def store_variance(self, store: str, name: str, metric: int = 0) -> float:
        """Error variance of keeping a tensor in a format."""
        return self._variance(("store", store), name, metric) * self.factor(store, name)

    def link_variance(self, link: Link, name: str, metric: int = 0) -> float:
        """Error variance of one contraction argument rounded to a format."""
        key = (link.contraction, link.argument)
        rounded = argument_format(link, name)
        return self._variance(key, rounded, metric) * self.factor(link.contraction, name)

    def internal_variance(self, contraction: str, name: str, metric: int = 0) -> float:
        """Error variance of a contraction's own intermediate results in a format.

        Narrow running sums count in the first metric only; the others are for information.
        """
        found = self._variance(("internal", contraction), name, metric)
        summed = self.statistics.accumulations.get((contraction, name))
        if summed is not None and metric == 0:
            found += summed.variance
        return found * self.factor(contraction, name)

    def factor(self, site: str, name: str) -> float:
        """What verification multiplies a site's predicted variance in a format by."""
        return self.raised.get(site, {}).get(name, 1.0)

    @cached_property
    def pairs(self) -> tuple[tuple[Link, Link, Correlation], ...]:
        """Readers of one tensor whose effects go together so far that it counts.

        A correlation of less than PAIR_COUNTS is below what one probe tells, and left out.
        """
        links = {(link.contraction, link.argument): link for link in self.links.reads}
        return tuple(
            (links[pair.first], links[pair.second], pair)
            for pair in self.statistics.correlations
            if pair.first[0] in self.links.contractions and self._goes_together(pair)
        )

    def _goes_together(self, pair: Correlation) -> bool:
        both = [
            self.statistics.operands[edge].variance(_GAUGE) for edge in (pair.first, pair.second)
        ]
        scale = float(both[0] * both[1]) ** 0.5
        return bool(abs(pair.covariance(_GAUGE)) > PAIR_COUNTS * scale)

    def pair_variance(self, first: Link, second: Link, pair: Correlation, name: str) -> float:
        """What two readers in one format add to the sum of their variances."""
        factor = self.factor(first.contraction, name) * self.factor(second.contraction, name)
        return float(2.0 * pair.covariance(CHOICES[name]) * factor**0.5)

    def exact_sources(self, store: str) -> tuple[str, ...]:
        """Stored tensors that a stored tensor has its significant bits from, if all are narrow."""
        return self.statistics.exact.get(store, ())

    def rounds_again(self, stored: str, entered: str) -> bool:
        """Whether reading a stored tensor in another format rounds it once more."""
        return not CHOICES[entered].refines(CHOICES[stored])

    def seconds(self, assignment: Mapping[str, str]) -> float:
        """Predicted time of an assignment: sites and the casts between them."""
        total = self.prices.fixed + sum(
            self.prices.contractions[name][assignment[name]] for name in self.links.contractions
        )
        total += sum(self.prices.stores[name][assignment[name]] for name in self.links.stores)
        return total + sum(
            self.prices.casts[source][name] for source, name in self.casts(assignment)
        )

    def without_fixed_time(self) -> "Problem":
        """The same problem of what formats do change."""
        return replace(self, prices=replace(self.prices, fixed=0.0), _cache=self._cache)

    def stored_bytes(self, assignment: Mapping[str, str]) -> float:
        """Bytes kept for the backward pass if every tensor is kept as it is stored.

        Never less than ``activation_bytes``, and a sum over sites: what a limit is put on.
        """
        return self.saved.other + sum(
            size * CHOICES[assignment[store]].bytes for store, size in self.saved.elements.items()
        )

    def activation_bytes(self, assignment: Mapping[str, str]) -> float:
        """Predicted bytes that are kept from the forward to the backward pass.

        At the turn between the two, activation memory peaks. What only contractions read there,
        all in one format narrower than the stored one, is kept in that format: Inductor's
        partitioner saves the smaller of a tensor and its cast.
        """
        return self.saved.other + sum(
            size * CHOICES[self._kept_format(store, assignment)].bytes
            for store, size in self.saved.elements.items()
        )

    def _kept_format(self, store: str, assignment: Mapping[str, str]) -> str:
        stored = assignment[store]
        readers = {entry_format(assignment[name]) for name in self._backward_readers.get(store, ())}
        if store in self.saved.fused or len(readers) != 1:
            return stored
        return min(stored, *readers, key=lambda name: CHOICES[name].bytes)

    @cached_property
    def _backward_readers(self) -> Mapping[str, tuple[str, ...]]:
        found: dict[str, list[str]] = defaultdict(list)
        for link in self.links.reads:
            if (
                link.store is not None
                and link.store in self.saved.elements
                and link.contraction.rpartition(".")[2] != "fprop"
            ):
                found[link.store].append(link.contraction)
        return {store: tuple(names) for store, names in found.items()}

    def casts(self, assignment: Mapping[str, str]) -> set[tuple[str, str]]:
        """Copies (source node, format) that an assignment needs.

        One for every format a contraction reads a tensor in that it is not stored in, and one
        where a result is stored in another format than its contraction returns.
        """
        found = set()
        for link in self.links.reads:
            wanted = entry_format(argument_format(link, assignment[link.contraction]))
            stored = assignment[link.store] if link.store else "fp32"
            if wanted != stored:
                found.add((link.source, wanted))
        for store, writer in self.links.writer.items():
            returned, kept = result_format(assignment[writer]), assignment[store]
            if returned not in (None, kept):
                found.add((self.links.stores[store].node, kept))
        return found

    def variance(self, assignment: Mapping[str, str]) -> float:
        """Predicted relative variance of the gradient under an assignment."""
        return sum(self.variances(assignment).values())

    def variances(self, assignment: Mapping[str, str], metric: int = 0) -> dict[str, float]:
        """The same per site; an argument's rounding belongs to the contraction that asks for it.

        Args:
            assignment: format by site.
            metric: row of METRICS; the others are kept without the products of readers.
        """
        found = {
            store: self.store_variance(store, assignment[store], metric)
            if self._is_rounded(store, assignment)
            else 0.0
            for store in self.links.stores
        }
        rounded: dict[Edge, str] = {}
        for name in self.links.contractions:
            found[name] = self.internal_variance(name, assignment[name], metric)
        for link in self.links.reads:
            chosen = argument_format(link, assignment[link.contraction])
            if self.rounds_again(assignment[link.store] if link.store else "fp32", chosen):
                found[link.contraction] += self.link_variance(link, chosen, metric)
                rounded[link.contraction, link.argument] = chosen
        for first, second, pair in self.pairs if metric == 0 else ():
            chosen = rounded.get(pair.first, "fp32")
            if chosen != "fp32" and rounded.get(pair.second) == chosen:
                shared = self.pair_variance(first, second, pair, chosen) / 2
                found[first.contraction] += shared
                found[second.contraction] += shared
        return found

    def _is_rounded(self, store: str, assignment: Mapping[str, str]) -> bool:
        sources = self.exact_sources(store)
        return not sources or any(
            self.rounds_again(assignment[source], assignment[store]) for source in sources
        )

    def error(self, assignment: Mapping[str, str], metric: int = 0) -> float:
        """Predicted error of an assignment in one of METRICS: relative for gradients."""
        return float(max(0.0, sum(self.variances(assignment, metric).values())) ** 0.5)

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
        limited = self.most_bytes < inf
        if limited and self.stored_bytes(assignment) > self.most_bytes * (1 + 1e-6):
            yield f"more than {readable_bytes(self.most_bytes)} are kept for the backward pass"

    def uniform(self, name: str = "fp32") -> dict[str, str]:
        """The assignment of one format to every site."""
        return dict.fromkeys(self.options, name)

    def flips(self, assignment: Mapping[str, str]) -> float:
        """The squared relative gradient error that flipped choices alone cause."""
        density = self.statistics.flip_density
        return flip_variance(density, self.error(assignment, COMPARED) ** 2) if density else 0.0

    def steepest(self, error: float) -> float:
        """The slope that is right where flips alone use an error up; 0 if there are none."""
        density = self.statistics.flip_density
        return steepest(density, error) if density and 0.0 < error < inf else 0.0

    def flip_slope(self, assignment: Mapping[str, str]) -> float:
        """The slope with which predictions are right for an assignment.

        What flips cause grows with the root of the variance of the numbers that choose. A sum over
        sites needs a straight line: for fewer errors than this assignment's it is too low, by 12 %
        of the total error at the most if that stays the same, and for more it is too high.
        """
        flips = self.flips(assignment)
        return flips / self.error(assignment, COMPARED) ** 2 if flips else 0.0

    def expected_error(self, assignment: Mapping[str, str]) -> float:
        """``error`` as if ``slope`` were right for the assignment."""
        line = self.slope * self.error(assignment, COMPARED) ** 2
        return float(max(0.0, self.variance(assignment) - line + self.flips(assignment)) ** 0.5)

    def _variance(self, key: tuple[object, object], name: str, metric: int) -> float:
        found = self._first_order(key, name, metric)
        if metric == 0 and self.slope:
            found += self.slope * self._first_order(key, name, COMPARED)
        return found

    def _first_order(self, key: tuple[object, object], name: str, metric: int) -> float:
        if name == "fp32":
            return 0.0
        slot = (key, name, metric)
        if slot not in self._cache:
            self._cache[slot] = sum(
                found.variance(CHOICES[name], metric=metric) for found in self._tensors(key)
            )
        return self._cache[slot]

    def _tensors(self, key: tuple[object, object]) -> tuple[Sensitivity, ...]:
        kind, item = key
        if kind == "store":
            return (self.statistics.stores[str(item)],)
        if kind == "internal":
            return self.statistics.internals.get(str(item), ())
        assert isinstance(item, int)
        return (self.statistics.operands[str(kind), item],)


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

    def later(self, seconds: float) -> "Solution":
        """The same where everything takes so many seconds more."""
        total = self.seconds + seconds
        gap = _gap(self.seconds - self.bound, total)
        return replace(self, seconds=total, bound=self.bound + seconds, gap=gap)


def _gap(difference: float, seconds: float) -> float:
    """A difference as a share of a time; 0 where it is that of float64 sums in another order."""
    share = difference / seconds if seconds else 0.0
    return share if share > 1e-12 else 0.0


def judged(problem: Problem, assignment: dict[str, str], bound: float) -> Solution:
    """An assignment with its exact time and error."""
    broken = next(problem.violations(assignment), None)
    if broken:
        raise InternalError(f"the solver returned an illegal assignment: {broken}")
    exact = problem.seconds(assignment)
    bound = min(bound, exact)
    return Solution(assignment, exact, problem.error(assignment), bound, _gap(exact - bound, exact))
