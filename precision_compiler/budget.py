"""How large a gradient error is allowed, and where the number comes from."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from precision_compiler.errors import BudgetError
from precision_compiler.journal import STRICT

TRUST_REGION = 0.2
"""Predicted relative gradient error up to which first-order analysis was found to hold."""


@dataclass(frozen=True)
class Budget:
    """The allowed relative gradient error ``||dG|| / ||G||``.

    Attributes:
        asked: what the user asked for: a number, "autocast", "noise:x" or "auto".
        limit: the number it came to.
        origin: a sentence on how the limit was found.
        bound_by: which term set the limit.
        noise_factor: the x of "noise:x".
        autocast: predicted error of torch.autocast's bf16 policy.
        noise: standard deviation of the gradient between mini-batches over its norm; None if it
            could not be estimated.
        noise_origin: what the noise was estimated from, or why it was not.
    """

    __pydantic_config__ = STRICT

    asked: str
    limit: float
    origin: str
    bound_by: Literal["number", "autocast", "noise", "trust region", "nothing yet"] = "number"
    noise_factor: float | None = None
    autocast: float | None = None
    noise: float | None = None
    noise_origin: str = ""

    @property
    def needs_noise(self) -> bool:
        """Whether the limit depends on the gradient's noise between mini-batches."""
        return self.asked == "auto" or self.noise_factor is not None

    @staticmethod
    def parse(asked: float | str) -> "Budget":
        """Read what the user asked for; all but numbers get their limit in a pass.

        Raises:
            BudgetError: neither a number of 0 or more, nor "autocast", "noise:x" or "auto".
        """
        if asked in ("auto", "autocast"):
            return Budget(str(asked), float("inf"), "not measured yet", "nothing yet")
        word, colon, rest = str(asked).partition(":")
        of_noise = word == "noise" and bool(colon)
        try:
            number = float(rest if of_noise else asked)
        except (TypeError, ValueError):
            number = -1.0
        if not (isfinite(number) and number >= 0):
            raise BudgetError(
                f"budget {asked!r} is none of 'auto', 'autocast', 'noise:x' and a finite number "
                ">= 0: pass the largest allowed relative gradient error, for example 0.01"
            )
        if of_noise:
            asked, origin = f"noise:{number:g}", "not measured yet"
            return Budget(asked, float("inf"), origin, "nothing yet", noise_factor=number)
        return Budget(f"{number:g}", number, "set by the user")
