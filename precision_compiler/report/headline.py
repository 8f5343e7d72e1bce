"""The headline of a report: the plan beside float32 and autocast, and the facts under it."""

from dataclasses import asdict, dataclass
from typing import Any

from precision_compiler.outcomes import Verification
from precision_compiler.plan import Plan
from precision_compiler.report.show import calibrated_line, milliseconds
from precision_compiler.sizes import readable_bytes

_SHOWN_ABOVE = {
    "predicted_seconds",
    "predicted_gradient_error",
    "bound_seconds",
    "gap",
    "fp32_seconds",
    "autocast_seconds",
    "autocast_gradient_error",
    "casts",
    "calibrated",
}


@dataclass(frozen=True)
class Candidate:
    """One row of the headline: a way to run the model.

    Attributes:
        name: "plan", "autocast bf16" or "fp32".
        time: predicted milliseconds.
        of_longest: its time as a share of the longest of the three, 0 to 1.
        speedup: how much faster the plan is.
        error: predicted relative gradient error.
        measured: milliseconds in the trial; empty if there was none.
    """

    name: str
    time: str
    of_longest: float
    speedup: str
    error: str
    measured: str


@dataclass(frozen=True)
class Fact:
    """A line under the table: what it is called, what it says, whether it is bad news."""

    name: str
    text: str
    bad: bool = False


def candidates(plan: Plan) -> list[Candidate]:
    """The plan, autocast and float32, by time and error."""
    totals = plan.totals
    rows = (
        ("plan", "plan", totals.predicted_seconds, totals.predicted_gradient_error),
        ("autocast", "autocast bf16", totals.autocast_seconds, totals.autocast_gradient_error),
        ("fp32", "fp32", totals.fp32_seconds, 0.0),
    )
    longest = max(seconds for _, _, seconds, _ in rows) or 1.0
    timed = plan.trial.seconds if plan.trial else {}
    return [
        Candidate(
            name=name,
            time=milliseconds(seconds),
            of_longest=seconds / longest,
            speedup=_ratio(seconds, totals.predicted_seconds),
            error=f"{error:.2g}",
            measured=milliseconds(timed[key]) if key in timed else "",
        )
        for key, name, seconds, error in rows
    ]


def facts(plan: Plan) -> list[Fact]:
    """What bounds the plan and what became of its promises: budget, gap, verification, trial."""
    totals, budget = plan.totals, plan.budget
    asked = "" if budget.bound_by == "number" else f" ({budget.asked}, bound by {budget.bound_by})"
    found = [
        Fact(
            "budget",
            f"{budget.limit:.3g}{asked}: {budget.origin}",
            bad=totals.predicted_gradient_error > budget.limit,
        ),
        Fact(
            "gap",
            f"{totals.gap:.1%}: proven that no plan within the budget takes less than "
            f"{milliseconds(totals.bound_seconds)} ms",
        ),
        _verified(plan, plan.verification),
    ]
    if plan.totals.calibrated is not None:
        found.append(Fact("step time", calibrated_line(plan)))
    return found if plan.trial is None else [*found, Fact("trial", plan.trial.sentence)]


def particulars(plan: Plan) -> list[Fact]:
    """What else the plan says of itself, totals that this program does not know included."""
    totals = asdict(plan.totals)
    size = f"{len(plan.sites)} sites, {len(plan.nodes)} nodes"
    if plan.measures != "outputs":  # an ONNX file's casts are not those of its plan
        size += f", {plan.totals.casts} casts"
    made_by = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return [
        Fact("graph", size),
        Fact("loss from", plan.loss_origin),
        *(
            Fact(key.replace("_", " "), _text(key, value))
            for key, value in totals.items()
            if key not in _SHOWN_ABOVE and value is not None
        ),
        Fact("made by", made_by),
    ]


def _verified(plan: Plan, verification: Verification | None) -> Fact:
    if verification is None:
        return Fact("verification", "none: the prediction was not checked on a batch", bad=True)
    found = verification.measured
    batch = "a held-out batch" if verification.held_out else "the calibration batch"
    verdict = "passed" if verification.passed else "FAILED"
    of_outputs = plan.measures == "outputs"
    loss = (
        ""
        if of_outputs
        else (f"; loss {found.loss_error:+.1g}, sigma {found.predicted_loss_sigma:.1g} predicted")
    )
    return Fact(
        "verification",
        f"{verdict}: {'output' if of_outputs else 'gradient'} error {found.gradient_error:.2g} "
        f"measured on {batch}, {found.predicted_gradient_error:.2g} predicted (ratio "
        f"{found.ratio:.2f}); per tensor {found.tensor_error:.2g}{loss}; rounds: "
        f"{verification.rounds}",
        bad=not verification.passed,
    )


def _ratio(seconds: float, of: float) -> str:
    return f"{seconds / of:.2f}x" if of else "-"


def _text(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return readable_bytes(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
