"""Delayed scaling: what the history does to the scale, step by step."""

import pytest
import torch

from precision_compiler.delayed import DelayedScaling
from precision_compiler.errors import FormatError
from precision_compiler.formats import FORMATS, round_to

E4M3 = FORMATS["e4m3"]


def after(*largest: float, window: int = 3, margin: int = 0) -> DelayedScaling:
    """A state that has seen steps of the given largest magnitudes."""
    state = DelayedScaling(E4M3, window, margin)
    for amax in largest:
        state.update(torch.tensor(amax))
    return state


def test_the_first_step_has_a_scale_of_one() -> None:
    state = DelayedScaling(E4M3)
    assert state.scale.item() == 1.0
    assert state.history.tolist() == [0.0] * 1024


def test_the_scale_is_that_of_the_largest_step_in_the_window() -> None:
    assert after(7.0).scale.item() == 64.0
    assert after(7.0, 14.0).scale.item() == 32.0
    assert after(14.0, 7.0, 3.5).scale.item() == 32.0
    assert after(14.0, 7.0, 3.5, 3.5).scale.item() == 64.0  # the first step has left the window
    assert after(1.0, 2.0, 3.0, 4.0).history.tolist() == [4.0, 3.0, 2.0]


def test_a_margin_keeps_binary_orders_of_magnitude_free() -> None:
    assert after(7.0, margin=3).scale.item() == 8.0


@pytest.mark.parametrize("useless", [0.0, torch.inf, torch.nan])
def test_a_history_that_says_nothing_leaves_the_scale(useless: float) -> None:
    assert after(useless).scale.item() == 1.0
    state = after(7.0, window=1)
    state.update(torch.tensor(useless))
    assert state.scale.item() == 64.0


def test_a_tiny_history_takes_the_largest_scale() -> None:
    assert after(2.0**-149).scale.item() == FORMATS["fp32"].max_finite


def test_a_step_rounds_under_the_scale_of_the_steps_before() -> None:
    state = after(7.0)
    x = torch.tensor([1.3, -6.9, 20.0])
    found = state(x)
    assert torch.equal(found[:2], round_to(x[:2] * 64, E4M3) / 64)
    assert found[2].item() == 7.0  # larger than anything seen: saturated
    assert state.history.tolist() == [20.0, 7.0, 0.0]
    assert state.scale.item() == pytest.approx(448 / 20, rel=2.0**-23)
    assert state(torch.zeros(0)).shape == (0,)
    assert state.history.tolist() == [0.0, 20.0, 7.0]


def test_history_and_scale_are_saved_and_loaded() -> None:
    state, other = after(7.0, 2.0), DelayedScaling(E4M3, 3)
    assert set(state.state_dict()) == {"history", "scale"}
    other.load_state_dict(state.state_dict())
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(state(x), other(x))
    assert torch.equal(state.history, other.history)
    assert not list(state.parameters())
    assert repr(state) == "DelayedScaling(e4m3, window=3, margin=0)"


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(FormatError, match="a window of 0 steps"):
        DelayedScaling(E4M3, 0)
