"""Time against variance of one part of a problem: only the points of it that were asked for."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
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
        window: least and largest variance that is asked for, where parts are told apart by it.
    """

    part: Problem
    program: Program
    members: list[tuple[str, ...]]
    points: dict[tuple[str, ...], Point] = field(default_factory=dict)
    proven: dict[float, float] = field(default_factory=dict)
    window: tuple[float, float] = (-inf, inf)
    _barred: bytes = b""

    def __post_init__(self) -> None:
        """Start with float32 everywhere, or all there is."""
        self.proven[0.0] = self.program.floor
        if self.points:
            return
        if self.is_listed:
            for formats in product(*self.part.options.values()):
                assignment = dict(zip(self.part.options, formats, strict=True))
                if not any(self.part.violations(assignment)):
                    self._add(assignment)
        elif all("fp32" in formats for formats in self.part.options.values()):
            self._add(self.part.uniform())
        elif not self.program.is_signed:  # else it might rest on errors that cancel too well
            quietest = self.program.quietest()
            if quietest is not None:
                self._add(quietest[0])

    @cached_property
    def is_listed(self) -> bool:
        """Whether all assignments are points."""
        few = prod(map(len, self.part.options.values())) <= _ALL
        return few and not self.program.is_signed

    def within(self, cap: float) -> list[Point]:
        """The points of at most some variance, in the window."""
        low, high = self.window[0] * (1 - 1e-9), min(cap, self.window[1]) * (1 + 1e-9)
        return [point for point in self.points.values() if low <= point.variance <= high]

    def halves(self, middle: float) -> tuple["Tradeoff", "Tradeoff"]:
        """The same part with at most and with at least some variance: all assignments in two."""
        low, high = self.window
        return (
            replace(self, proven=dict(self.proven), window=(low, middle)),
            replace(self, proven=dict(self.proven), window=(middle, high)),
        )

    @cached_property
    def least_variance(self) -> float:
        """A lower bound on the variance: less than 0 only if roundings overcompensate others."""
        if not self.program.is_signed:
            return 0.0
        quietest = self.program.quietest()
        return min(0.0, quietest[1]) if quietest else 0.0

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

    def ask(self, rate: float, limit: float, cap: float, seconds: float) -> float:
        """Lower bound of ``least(rate)`` within a limit; adds the point that reaches it.

        Args:
            rate: seconds that a unit of variance costs.
            limit: of the variance in total.
            cap: largest variance of this part, whatever the others choose.
            seconds: time limit; the bound is loose after it.
        """
        most = self._least_known(rate, cap)
        if self.is_listed:
            return most
        low = self._chord(rate)
        if low >= most - _SAME * abs(most):
            return min(low, most)
        window = (self.window[0], min(self.window[1], cap))
        found = self.program.weighed(rate, limit, most, seconds)
        if found is not None and not self._is_asked_for(self._add(found[0]), window):
            low = max(low, found[1])
            found = self.program.weighed(rate, limit, most, seconds, window)
        if found is not None:
            self._add(found[0])
            low = max(low, min(found[1], self._least_known(rate, cap)))
        if low > -inf:
            self.proven[rate] = low
        return low

    def bisect(self, rate: float, cap: float) -> float | None:
        """Variance half way between the best point at a rate and the next faster corner."""
        corners = list(self.hull(cap))
        if not corners:
            return None
        best = min(corners, key=lambda point: point.seconds + rate * point.variance)
        after = corners[corners.index(best) + 1 :]
        return (best.variance + after[0].variance) / 2 if after else None

    def improve(self, most: float, seconds: float) -> None:
        """Add the fastest assignment of at most some variance.

        Args:
            most: that variance.
            seconds: time limit.
        """
        if self.is_listed:
            return
        found = self.program.minimise(most, 1e-3, max(0.1, min(seconds, 1.0)))
        if found is not None:
            self._add(found[0])

    def hull(self, cap: float) -> Iterator[Point]:
        """Corners of the lower convex hull of the points: from least variance to least time."""
        corners: list[Point] = []
        for point in pareto(self.within(cap)):
            while len(corners) > 1 and not _turns(corners[-2], corners[-1], point):
                corners.pop()
            corners.append(point)
        yield from corners

    @staticmethod
    def _is_asked_for(point: Point, window: tuple[float, float]) -> bool:
        return window[0] * (1 - 1e-9) <= point.variance <= window[1] * (1 + 1e-9)

    def _least_known(self, rate: float, cap: float) -> float:
        sums = (point.seconds + rate * point.variance for point in self.within(cap))
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

    def _add(self, assignment: Mapping[str, str]) -> Point:
        part = self.part
        formats = tuple(assignment[name] for name in part.options)
        point = Point(part.seconds(assignment), part.variance(assignment), formats)
        self.points[formats] = point
        return point


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
