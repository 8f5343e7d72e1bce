"""Correct predicted step times by two that were measured."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Calibrated:
    """Predicted times, corrected by two steps that were measured.

    Prices add up operations timed one by one, in caches of their own and on a machine that may
    have been busier then; generated kernels are known by their traffic alone. One rate and one
    fixed time make the predictions of the float32 step and of autocast's come out as measured.

    Attributes:
        rate: measured over predicted time of what formats change.
        fixed: seconds that no prediction has.
    """

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

    def seconds(self, predicted: float) -> float:
        """The corrected time of a step that is predicted to take so many seconds."""
        return self.fixed + self.rate * predicted
