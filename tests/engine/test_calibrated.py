"""The rule that corrects predicted step times."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from precision_compiler.calibrated import ANCHORS, Calibrated

seconds = st.floats(1e-3, 10.0)


@given(seconds, seconds, st.floats(0.1, 5.0), st.floats(0.0, 1.0), seconds)
def test_two_steps_tell_rate_and_fixed_time(
    one: float, other: float, rate: float, fixed: float, third: float
) -> None:
    assume(abs(one - other) > 1e-3)
    slow, fast = max(one, other), min(one, other)
    found = Calibrated.of((slow, fast), (fixed + rate * slow, fixed + rate * fast))
    assert found.seconds(third) == pytest.approx(fixed + rate * third, rel=1e-6)


@given(seconds, seconds, seconds, seconds)
def test_measured_steps_come_out_and_no_time_is_negative(
    slow: float, fast: float, long: float, short: float
) -> None:
    found = Calibrated.of((slow, fast), (long, short))
    assert found.rate > 0
    assert found.fixed >= 0
    if slow > fast and long > short:
        assert found.seconds(slow) == pytest.approx(long)


def test_what_was_measured_decides_how_predictions_are_corrected() -> None:
    predicted = {"plan": 5.0, "fp32": 10.0, "autocast": 6.0}
    measured = {"plan": 99.0, "fp32": 21.0, "autocast": 13.0}
    assert Calibrated.by_anchors(predicted, measured) == Calibrated(2.0, 1.0)
    for label in ANCHORS:  # a rate from one step
        one = Calibrated.by_anchors(predicted, {label: measured[label], "plan": 99.0})
        assert one == Calibrated(measured[label] / predicted[label], 0.0)
    assert Calibrated.by_anchors(predicted, {"plan": 99.0}) is None
