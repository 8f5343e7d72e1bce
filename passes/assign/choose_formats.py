"""See ChooseFormats."""

from dataclasses import dataclass, replace
from typing import ClassVar

from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.solver import solve


@dataclass(frozen=True)
class ChooseFormats:
    """Find the fastest assignment whose predicted gradient error is within the budget.

    A mixed-integer program, solved by HiGHS to a proven gap:

    1. One binary per (site, format); every site has exactly one format.
    2. One copy variable per (tensor, format): at 1 where any contraction reads the tensor in a
       format it is not stored in, or where a result is stored in another format than it comes
       in; its price is paid once, however many read it.
    3. One rounding variable per (argument, format): at 1 where the stored tensor has more
       significant bits than the contraction's format; its variance counts then. The same for a
       stored tensor that is an exact function of other stored ones: it is rounded only where it
       is kept in fewer bits than one of them.
    4. One variable per pair of arguments that read the same rounded copy and whose effects go
       together: at 1 where both are rounded to the same format; it carries their covariance.
    5. Contractions that return their own format fix the format of their results.
    6. The sum of relative error variances is at most ``budget^2``.
    7. The error of flipped choices grows with the root of the variance of the numbers that choose.
       The sum of 6 has a straight line in its place, first through the point where flips alone use
       the budget up; if it is off by more than ``tolerance`` for what is found, through that, and
       the problem is solved again.
    8. Large problems are solved part by part, parts being what touches nowhere but in the budget;
       the proof that holds for the whole is in ``precision_compiler.solver``.

    Variables of 2 to 4 need no integrality: given binary sites they sit at 0 or 1.
    """

    gap: float = 1e-3
    seconds: float = 60.0
    tolerance: float = 0.01
    turns: int = 5
    name: ClassVar[str] = "choose-formats"
    reads: ClassVar[frozenset[str]] = frozenset(
        {"statistics", "vetoes", "contraction prices", "traffic prices", "budget"}
    )
    makes: ClassVar[frozenset[str]] = frozenset({"assignment"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.solution`` and ``unit.assignment``."""
        unit.expect_flips(unit.problem.steepest(unit.budget.limit))
        for _ in range(self.turns):
            found = solve(unit.problem, unit.budget.limit, self.gap, self.seconds)
            expected = unit.problem.expected_error(found.assignment)
            unit.expect_flips(unit.problem.flip_slope(found.assignment))
            if abs(expected - found.error) <= self.tolerance * found.error:
                break
        unit.solution = replace(found, error=unit.problem.error(found.assignment))
        unit.assignment = dict(found.assignment)
        return False
