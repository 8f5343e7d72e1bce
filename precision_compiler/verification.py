"""Check a plan's prediction by running its exact numerics, and correct the plan where it fails."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured
from precision_compiler.journal import Journal
from precision_compiler.outcomes import MeasuredError, Verification
from precision_compiler.passes import CHOOSE, EMULATE
from precision_compiler.pipeline import Pipeline, Progress, Unit, silent
from precision_compiler.problem import entry_format
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.statistics import METRICS

ROUNDS = 3
"""Times that a plan is corrected at the most."""

MISS = 1.5
"""Measured over predicted error from which the prediction has failed."""

MARGIN = 1.05
"""What all predictions are raised by beyond the miss: without it every second plan that the solver
puts at the limit would exceed it again, by a few per cent of chance."""

MOST = 1e6
"""What an infinite or undefined error counts as."""

_FLOAT32_NOISE = float(torch.finfo(torch.float32).eps)
_STEP = "verify-plan"
_LOSS = METRICS.index("loss")


class Truth:
    """Gradients and loss of one batch in float32, to compare a plan's numerics with."""

    def __init__(self, captured: Captured, zero_gradients: Sequence[str]) -> None:
        """Run the batch in float32.

        Args:
            captured: graph and batch.
            zero_gradients: parameters whose gradient is zero by the model's structure.
        """
        self.captured, self.zero_gradients = captured, tuple(zero_gradients)
        self.loss, self.gradients = gradients_of(captured)

    def measure(
        self, assignment: Mapping[str, str], predicted: float, sigma: float
    ) -> MeasuredError:
        """The errors of an assignment's exact numerics.

        Args:
            assignment: format by site.
            predicted: its predicted relative gradient error.
            sigma: the predicted standard deviation of its loss.
        """
        loss, found = gradients_of(self.captured, emulated(self.captured, assignment))
        names = self.captured.joint.goal_names
        tensors = {
            name: _finite(relative_error([one], [exact]))
            for name, one, exact in zip(names, found, self.gradients, strict=True)
            if name not in self.zero_gradients and exact.any()
        }
        squares = [error**2 for error in tensors.values()]
        return MeasuredError(
            gradient_error=_finite(relative_error(found, self.gradients)),
            predicted_gradient_error=predicted,
            tensor_error=(sum(squares) / len(squares)) ** 0.5 if squares else 0.0,
            tensors=tensors,
            zero_gradients=self.zero_gradients,
            loss=float(self.loss),
            loss_error=_finite(float(loss - self.loss)),
            predicted_loss_sigma=sigma,
        )


def _finite(error: float) -> float:
    """An error as a number that JSON knows; beyond MOST, or undefined, it is MOST."""
    return max(-MOST, min(error, MOST)) if error == error else MOST


def emulated(captured: Captured, assignment: Mapping[str, str]) -> fx.GraphModule:
    """A captured graph with the exact numerics of an assignment, in float32 arithmetic."""
    unit = Unit(
        captured.joint.copy(), None, Budget.parse(0), Journal(), assignment=dict(assignment)
    )
    Pipeline(EMULATE, given=frozenset({"assignment"})).run(unit)
    return unit.joint.module


def verify_plan(
    unit: Unit, captured: Captured, held_out: bool, progress: Progress = silent
) -> Verification:
    """Measure the unit's assignment; where it fails, raise what was underrated and solve again.

    1. It passes where the measured error is within the budget and 1.5 times the prediction. A
       plan that rounds nothing may differ by float32's own epsilon: threads add in any order.
    2. Otherwise, also where only the budget is exceeded, groups of like sites are measured alone.
       Those that err by more than 1.5 times their prediction are measured in every other format
       that they may have, too, and their variances in such formats multiplied by what was found.
    3. Where no group stands out, the predicted errors of all sites are multiplied by measured over
       predicted, or over what is allowed if that is more, and by a margin of 5 %.

    Args:
        unit: decided; its assignment is replaced by better ones.
        captured: the batch to measure on.
        held_out: whether it had no part in the calibration.
        progress: called with a sentence before each step.
    """
    assert unit.statistics is not None
    progress("Measure the plan's error")
    truth = Truth(captured, [one.name for one in unit.statistics.tensors if one.is_zero])
    for turn in range(1, ROUNDS + 2):
        found = _measured(truth, unit, unit.assignment)
        rounded = any(fmt != "fp32" for fmt in unit.assignment.values())
        allowed = unit.budget.limit if rounded else max(unit.budget.limit, _FLOAT32_NOISE)
        passed = found.ratio <= MISS and found.gradient_error <= allowed
        unit.journal.note(_STEP, _sentence(found, unit, held_out))
        if passed or turn > ROUNDS or not rounded:
            break
        progress(f"Correct the prediction and solve again, round {turn}")
        unit.raise_predictions(_corrections(truth, unit, found))
        Pipeline(CHOOSE, given=CHOOSE[0].reads).run(unit)
    return Verification(found, held_out, turn, unit.raised, passed)


def _measured(truth: Truth, unit: Unit, assignment: Mapping[str, str]) -> MeasuredError:
    problem = unit.problem
    sigma = problem.error(assignment, _LOSS)
    return truth.measure(assignment, problem.expected_error(assignment), sigma)


def _corrections(truth: Truth, unit: Unit, found: MeasuredError) -> dict[tuple[str, str], float]:
    """Factors on the variances of sites, by site and format."""
    factors: dict[tuple[str, str], float] = {}
    for (label, fmt), sites in _groups(unit).items():
        ratios = {fmt: _ratio_alone(truth, unit, sites, fmt)}
        if ratios[fmt] > MISS:
            # Else the solver would go over to other formats, which may be as underrated.
            others = _alternatives(unit, sites) - {fmt}
            ratios |= {name: _ratio_alone(truth, unit, sites, name) for name in sorted(others)}
        for name, ratio in ratios.items():
            if ratio > MISS:
                message = f"{label} in {name}: {ratio:.2f} times the predicted error, raised"
                unit.journal.note(_STEP, message)
                factors |= {(s, name): min(ratio, MOST) ** 2 for s in _able(unit, sites, name)}
    if factors:
        return factors
    over = found.gradient_error / unit.budget.limit if unit.budget.limit else 1.0
    worst = max(found.ratio, over) * MARGIN
    unit.journal.note(_STEP, f"all predictions raised {worst:.2f} times")
    # Sites that are float32 now too: else the solver would go over to them, as underrated as these.
    options = unit.problem.options
    every = [(site, name) for site, names in options.items() for name in names if name != "fp32"]
    return dict.fromkeys(every, min(worst, MOST) ** 2)


def _ratio_alone(truth: Truth, unit: Unit, sites: Sequence[str], name: str) -> float:
    """Measured over predicted error where nothing is rounded but some sites, if they may be."""
    alone = dict.fromkeys(_able(unit, sites, name), name)
    return _measured(truth, unit, unit.problem.uniform() | alone).ratio


def _able(unit: Unit, sites: Sequence[str], name: str) -> list[str]:
    """Those of some sites that may have a format."""
    return [site for site in sites if name in unit.problem.options[site]]


def _alternatives(unit: Unit, sites: Sequence[str]) -> set[str]:
    """Formats that are allowed at any of some sites and round stored tensors."""
    options = unit.problem.options
    return {name for site in sites for name in options[site] if entry_format(name) != "fp32"}


def _groups(unit: Unit) -> dict[tuple[str, str], list[str]]:
    """Sites that are rounded, by (kind, role and operation) and format."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for site in unit.joint.sites:
        fmt = unit.assignment[site.name]
        if fmt != "fp32":
            groups[f"{site.op} {site.role}", fmt].append(site.name)
    return groups


def _sentence(found: MeasuredError, unit: Unit, held_out: bool) -> str:
    batch = "a held-out batch" if held_out else "the calibration batch"
    limit = unit.budget.limit
    if unit.joint.inference:
        return (
            f"on {batch} the outputs err by {found.gradient_error:.3g}, predicted "
            f"{found.predicted_gradient_error:.3g}, allowed {limit:.3g}"
        )
    return (
        f"on {batch} the gradient errs by {found.gradient_error:.3g}, predicted "
        f"{found.predicted_gradient_error:.3g}, allowed {limit:.3g}; per tensor "
        f"{found.tensor_error:.3g}; the loss by {found.loss_error:.2g}, predicted "
        f"{found.predicted_loss_sigma:.2g}"
    )
