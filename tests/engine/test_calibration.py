"""The rule that corrects predicted step times."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.calibration import Calibrated

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
