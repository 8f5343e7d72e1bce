"""Time against variance of one part of a problem: only the points of it that were asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import inf, prod

from precision_compiler.problem import Problem
from precision_compiler.program import Program

_SAME = 1e-7  # relative difference of two sums that the solver does not tell apart
_ALL = 40  # assignments of a part up to which they are listed


@dataclass(frozen=True)
class Point:
    """What one assignment of a part comes to.

    Attributes:
        seconds: its time.
        variance: its share of the relative gradient error's variance.
        formats: one per site of the part, in its order.
    """

    seconds: float
    variance: float
    formats: tuple[str, ...]


@dataclass
class Tradeoff:
    """Parts that differ in the names of their sites only, and how fast they are at which error.

    ``least(rate)``, the smallest ``seconds + rate * variance`` of an assignment, is concave in
    the rate, as the minimum of straight lines. So between two rates it is at least on the chord
    of what was proven there, and at most on the lines of the points known: where these two meet,
    nothing has to be solved.

    Attributes:
        part: one of them.
        program: its program.
        members: the names of the sites of each.
        points: assignments found so far.
        proven: lower bounds of ``least`` by rate.
    """

    part: Problem
    program: Program
    members: list[tuple[str, ...]]
    points: dict[tuple[str, ...], Point] = field(default_factory=dict)
    proven: dict[float, float] = field(default_factory=dict)
    _barred: bytes = b""

    def __post_init__(self) -> None:
        """Start with float32 everywhere, or all there is."""
        if self.is_listed:
            for formats in product(*self.part.options.values()):
                self._add(dict(zip(self.part.options, formats, strict=True)))
        elif all("fp32" in formats for formats in self.part.options.values()):
            self._add(self.part.uniform())
        else:
            quietest = self.program.quietest()
            if quietest is not None:
                self._add(quietest)
        self.proven[0.0] = self.program.floor

    @cached_property
    def is_listed(self) -> bool:
        """Whether all assignments are points."""
        few = prod(map(len, self.part.options.values())) <= _ALL
        return few and not self.program.is_signed

    def within(self, limit: float) -> list[Point]:
        """The points that may be part of an assignment of at most some variance."""
        if self.program.is_signed:
            return list(self.points.values())
        return [point for point in self.points.values() if point.variance <= limit * (1 + 1e-9)]

    def narrow(self, limit: float) -> None:
        """Go on to a smaller limit: what was proven for more assignments holds for fewer."""
        if not self.program.is_signed:
            return
        barred = self.program.barred(limit).tobytes()
        if self._barred and barred != self._barred:
            self.points = {}  # which of them are still allowed is not known
            if all("fp32" in formats for formats in self.part.options.values()):
                self._add(self.part.uniform())
        self._barred = barred

    def ask(self, rate: float, limit: float, seconds: float) -> float:
        """Lower bound of ``least(rate)`` within a limit; adds the point that reaches it.

        Args:
            rate: seconds that a unit of variance costs.
            limit: of the variance in total.
            seconds: time limit; the bound is loose after it.
        """
        most = self._least_known(rate, limit)
        if self.is_listed:
            return most
        low = self._chord(rate)
        if low >= most - _SAME * abs(most):
            return min(low, most)
        found = self.program.weighed(rate, limit, most, seconds)
        if found is None:
            return low
        self._add(found[0])
        low = max(low, min(found[1], self._least_known(rate, limit)))
        self.proven[rate] = low
        return low

    def improve(self, formats: tuple[str, ...], left: float, seconds: float) -> None:
        """Add the fastest assignment of at most so much more variance than one that is known.

        Args:
            formats: of that one.
            left: variance that may be added.
            seconds: time limit.
        """
        if self.is_listed:
            return
        found = self.program.minimise(
            self.points[formats].variance + left, 1e-3, max(0.1, min(seconds, 1.0))
        )
        if found is not None:
            self._add(found[0])

    def hull(self, limit: float) -> Iterator[Point]:
        """Corners of the lower convex hull of the points: from least variance to least time."""
        corners: list[Point] = []
        for point in pareto(self.within(limit)):
            while len(corners) > 1 and not _turns(corners[-2], corners[-1], point):
                corners.pop()
            corners.append(point)
        yield from corners

    def _least_known(self, rate: float, limit: float) -> float:
        sums = (point.seconds + rate * point.variance for point in self.within(limit))
        return min(sums, default=inf)

    def _chord(self, rate: float) -> float:
        if rate in self.proven:
            return self.proven[rate]
        before = max(known for known in self.proven if known < rate)
        after = min((known for known in self.proven if known > rate), default=inf)
        low = self.proven[before]
        if after == inf:  # more variance never costs less, unless roundings make up for others
            return -inf if self.program.is_signed else low
        return low + (self.proven[after] - low) * (rate - before) / (after - before)

    def _add(self, assignment: Mapping[str, str]) -> None:
        part = self.part
        if any(part.violations(assignment)):
            return
        formats = tuple(assignment[name] for name in part.options)
        point = Point(part.seconds(assignment), part.variance(assignment), formats)
        self.points[formats] = point


def pareto(points: Iterable[Point]) -> list[Point]:
    """The points that no other beats in both, from least variance to least time."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.variance, point.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best


def _turns(first: Point, middle: Point, last: Point) -> bool:
    """Whether the middle of three points is below the line through the others."""
    steep = (first.seconds - middle.seconds) * (last.variance - middle.variance)
    flat = (middle.seconds - last.seconds) * (middle.variance - first.variance)
    return steep > flat
