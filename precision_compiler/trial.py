"""Time compiled training steps in turn, and tell which plan is really the fastest here."""

import copy
import gc
import hashlib
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from precision_compiler.calibrated import ANCHORS
from precision_compiler.calling import Loss, call_model, left_as_it_was, loss_of
from precision_compiler.measure import Machine, layout_key, timed
from precision_compiler.outcomes import Label, Trial

MARGIN = 0.02
"""Share by which another assignment must be faster to replace the solver's: below is noise."""

_FEWEST_TURNS, _MOST_TURNS = 5, 25
_ENOUGH = 4.0  # seconds per candidate
_UNTIMED = 2  # first steps, which compile

NAMES = {"plan": "the solver's formats", "fp32": "float32", "autocast": "autocast's formats"}
"""What sentences call the candidates."""

Compile = Callable[[nn.Module, str], nn.Module]


def run_trial(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    candidates: Mapping[str, str],
    prices: Mapping[str, float],
    compiled: Compile,
    machine: Machine,
) -> Trial | None:
    """Compile a copy of the model for every candidate, and time forward and backward passes.

    Args:
        model: the module; left as it was.
        batch: what it is called with.
        loss: as for ``make_plan``.
        candidates: digest of the decisions by label: "fp32", "autocast" and "plan".
        prices: predicted seconds by label.
        compiled: compiles a module in place for the candidate of a label.
        machine: keeps the times, so that the same steps are not timed twice.

    Returns:
        None, with a warning, if the model cannot be copied: copy.deepcopy refuses some tensors.
    """
    where = hashlib.sha256(layout_key(torch.utils._pytree.tree_leaves(batch)).encode()).hexdigest()
    keys = {label: f"step {digest} {where[:16]}" for label, digest in candidates.items()}
    missing = [label for label in candidates if keys[label] not in machine.cases]
    if missing:
        try:
            twins = {label: copy.deepcopy(model) for label in keys}
        except (RuntimeError, TypeError, NotImplementedError) as error:
            warnings.warn(
                f"the plan is not timed against float32 and autocast, since the model cannot be "
                f"copied: {error}; compile(..., trial=False) says that this is meant",
                stacklevel=2,
            )
            return None
        steps = {label: _step(compiled(twins.pop(label), label), batch, loss) for label in keys}
        with left_as_it_was(model):
            found = _alternate(steps, machine.device)
            machine.keep({keys[label]: value for label, value in found.items()})
        del steps
        gc.collect()
    seconds = {label: machine.cases[key] for label, key in keys.items()}
    calibrating = {candidates[label] for label in ANCHORS if label in candidates}
    anchors = [label for label, digest in candidates.items() if digest in calibrating]
    return verdict(seconds, prices, anchors, now=bool(missing))


def verdict(
    seconds: Mapping[str, float],
    prices: Mapping[str, float],
    anchors: Iterable[str],
    *,
    now: bool = True,
) -> Trial:
    """The winner of measured steps, with a sentence on it and on what had been predicted.

    Args:
        seconds: measured, by label.
        prices: predicted, by label.
        anchors: labels whose formats are those of a step that calibrates.
        now: whether they were measured just now.
    """
    fastest = cast(Label, min(seconds, key=lambda label: seconds[label]))
    winner: Label = fastest if seconds[fastest] < (1 - MARGIN) * seconds["plan"] else "plan"
    times = ", ".join(f"{label} {1e3 * value:.1f} ms" for label, value in seconds.items())
    if winner == "plan":
        why = f"are kept: nothing else was faster by more than {MARGIN:.0%}"
    else:
        slower = seconds["plan"] / seconds[winner] - 1
        why = f"{'is' if winner == 'fp32' else 'are'} kept: the solver's took {slower:.0%} longer"
    when = "measured now" if now else "measured earlier"
    trial = Trial(dict(seconds), winner, "", dict(prices), cast(tuple[Label, ...], tuple(anchors)))
    sentence = f"{NAMES[winner]} {why} ({times}; {when}){_prediction(trial)}"
    return replace(trial, sentence=sentence)


def _prediction(trial: Trial) -> str:
    """What was predicted for the solver's formats, and what came of it."""
    rule, measured = trial.calibrated, trial.seconds["plan"]
    if rule is None:
        return ""
    if "plan" in trial.anchors:
        return "; the solver's step is itself one of those that calibrate predictions"
    known = " and ".join(NAMES[label] for label in ANCHORS if label in trial.seconds)
    return (
        f"; predicted for the solver's: {1e3 * rule.seconds(trial.prices['plan']):.1f} ms by "
        f"calibration with {known}, {1e3 * trial.prices['plan']:.1f} ms as a sum of prices, "
        f"measured {1e3 * measured:.1f} ms"
    )


def _step(model: nn.Module, batch: Any, loss: Loss | None) -> Callable[[], None]:
    def run() -> None:
        value = loss_of(call_model(model, batch), batch, loss)
        value.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    return run


def _alternate(steps: Mapping[str, Callable[[], None]], device: str) -> dict[str, float]:
    """Median seconds of every step, all run in turn."""
    for step in steps.values():
        for _ in range(_UNTIMED):
            step()
    times: dict[str, list[float]] = {label: [] for label in steps}
    for turn in range(_MOST_TURNS):
        if turn >= _FEWEST_TURNS and all(sum(found) > _ENOUGH for found in times.values()):
            break
        for label, step in steps.items():
            times[label].append(timed(step, 1, device))
    return {label: statistics.median(found) for label, found in times.items()}
