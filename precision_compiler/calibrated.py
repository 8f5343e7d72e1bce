"""Correct predicted step times by steps that were measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from precision_compiler.journal import STRICT

ANCHORS = ("fp32", "autocast")
"""Steps that are measured to correct the predictions of all others, the slower one first."""


@dataclass(frozen=True)
class Calibrated:
    """Predicted times, corrected by steps that were measured.

    Prices add up operations timed one by one, in caches of their own and on a machine that may
    have been busier then; generated kernels are known by their traffic alone. One rate and one
    fixed time make the predictions of the float32 step and of autocast's come out as measured.

    Attributes:
        rate: measured over predicted time of what formats change.
        fixed: seconds that no prediction has.
    """

    __pydantic_config__ = STRICT

    rate: float
    fixed: float

    @staticmethod
    def of(predicted: tuple[float, float], measured: tuple[float, float]) -> "Calibrated":
        """From predicted and measured seconds of two steps, the slower one first."""
        (slow, fast), (long, short) = predicted, measured
        if slow <= fast or long <= short:
            return Calibrated(1.0, max(0.0, long - slow))
        rate = (long - short) / (slow - fast)
        if long < rate * slow:  # a negative fixed time: the rate alone has to do
            return Calibrated(long / slow, 0.0)
        return Calibrated(rate, long - rate * slow)

    @staticmethod
    def by_anchors(
        predicted: Mapping[str, float], measured: Mapping[str, float]
    ) -> "Calibrated | None":
        """From the steps among ANCHORS that were measured; None if there are none.

        Args:
            predicted: seconds by step.
            measured: seconds by step; one step alone gives a rate.
        """
        known = [label for label in ANCHORS if label in measured]
        if len(known) == len(ANCHORS):
            slow, fast = known
            return Calibrated.of(
                (predicted[slow], predicted[fast]), (measured[slow], measured[fast])
            )
        if known and predicted[known[0]] > 0:
            return Calibrated(measured[known[0]] / predicted[known[0]], 0.0)
        return None

    def seconds(self, predicted: float) -> float:
        """The corrected time of a step that is predicted to take so many seconds."""
        return self.fixed + self.rate * predicted
