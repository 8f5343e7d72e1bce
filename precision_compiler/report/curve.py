"""A frontier as places in a picture: what the page's template draws. Reads the frontier only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, floor, log10

from precision_compiler.frontier import Frontier, FrontierPoint
from precision_compiler.report.show import milliseconds

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 16, 12, 40
GUTTER = 40
"""Between the edge, where an error of zero is, and the smallest error there is."""


@dataclass(frozen=True)
class Mark:
    """One plan: its place, and what to call it."""

    x: float
    y: float
    name: str
    text: str


@dataclass(frozen=True)
class Curve:
    """Everything to draw.

    Attributes:
        path: of the fastest plans, as an SVG path of steps: no plan with less error is faster.
        plans: the fastest plans.
        others: the chosen plan, float32 and autocast.
        across, up: ticks: place and text.
    """

    path: str
    plans: tuple[Mark, ...]
    others: tuple[Mark, ...]
    across: tuple[tuple[float, str], ...]
    up: tuple[tuple[float, str], ...]


def curve_of(frontier: Frontier) -> Curve:
    """Time over error, the error on a logarithmic axis with zero at its edge."""
    named = (("plan", frontier.chosen), ("fp32", frontier.fp32), ("autocast", frontier.autocast))
    points = [*frontier.points, *(point for _, point in named)]
    x, across = _errors([point.error for point in points])
    y, up = _times([point.seconds for point in points])

    def mark(name: str, point: FrontierPoint) -> Mark:
        words = f"error {point.error:.2g}, {milliseconds(point.seconds)} ms"
        return Mark(x(point.error), y(point.seconds), name, f"{name}: {words}" if name else words)

    plans = tuple(mark("", point) for point in frontier.points)
    return Curve(
        path=" ".join(_steps(plans)),
        plans=plans,
        others=tuple(mark(name, point) for name, point in named),
        across=across,
        up=up,
    )


def _steps(plans: tuple[Mark, ...]) -> Iterator[str]:
    for number, plan in enumerate(plans):
        yield f"H {plan.x:.1f} V {plan.y:.1f}" if number else f"M {plan.x:.1f} {plan.y:.1f}"


Axis = tuple[Callable[[float], float], tuple[tuple[float, str], ...]]


def _errors(errors: list[float]) -> Axis:
    positive = [log10(error) for error in errors if error > 0] or [-3.0]
    low, high = floor(min(positive)), max(ceil(max(positive)), floor(min(positive)) + 1)
    start, end = LEFT + GUTTER, WIDTH - RIGHT

    def place(error: float) -> float:
        if error <= 0:
            return LEFT
        return start + (log10(error) - low) / (high - low) * (end - start)

    ticks = [(place(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)]
    return place, ((LEFT, "0"), *ticks)


def _times(seconds: list[float]) -> Axis:
    most = max(seconds) or 1.0

    def place(time: float) -> float:
        return TOP + (1 - time / most) * (HEIGHT - BOTTOM - TOP)

    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    return place, tuple((place(most * share), milliseconds(most * share)) for share in shares)
