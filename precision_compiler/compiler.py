"""Read this first: batch -> capture -> analyse -> cost -> assign -> verify -> rewrite -> plan."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import fx, nn

from precision_compiler.budget import Budget
from precision_compiler.calling import Loss
from precision_compiler.capture import Captured, capture
from precision_compiler.fitting import check_plan
from precision_compiler.frontier import Frontier
from precision_compiler.joint import JointGraph
from precision_compiler.journal import Journal
from precision_compiler.lowering.products import Lowered, products_of
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.lowering.support import architecture_for, shipped
from precision_compiler.outcomes import MeasuredError, Trial, Verification
from precision_compiler.passes import JUDGE, REWRITE
from precision_compiler.passes.analyse.borrow_statistics import BorrowStatistics
from precision_compiler.passes.analyse.measure_sensitivity import MeasureSensitivity
from precision_compiler.pipeline import Pass, Pipeline, Progress, Unit, silent
from precision_compiler.plan import Plan
from precision_compiler.problem import judged
from precision_compiler.record import frontier_of_unit, plan_of_unit
from precision_compiler.rehearsal import rehearse
from precision_compiler.sites import find_sites
from precision_compiler.sizes import bytes_of
from precision_compiler.sweep import frontier
from precision_compiler.target import Target
from precision_compiler.verification import Truth, verify_plan


def make_plan(
    model: nn.Module,
    batch: Any,
    *,
    loss: Loss | None = None,
    target: str | Target = "auto",
    budget: float | str = "auto",
    calibration: Iterable[Any] = (),
    held_out: Any = None,
    learning_rate: float | None = None,
    rehearsal: int = 0,
    memory: float | None = None,
    activation_memory: float | str | None = None,
    sibling: Plan | None = None,
    overrides: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Decide the formats of a model's training graph without compiling it.

    A model on the meta device, which has no weights, is planned from its graph: time and solver
    in full, errors taken from a smaller sibling's plan or from the formats alone.

    Args:
        model: the module, in the mode it trains in; left as it was.
        batch: a tensor, a tuple of arguments or a dict of keywords for the model.
        loss: ``loss(output, batch)`` giving a scalar; without it the model's output is the loss
            or has ``.loss``.
        target: "auto" for this machine, a shipped target's name, a TOML file or a ``Target``.
        budget: largest relative gradient error; "autocast": what torch.autocast would cause;
            "noise:x": x times the gradient's noise between mini-batches; "auto": the larger of
            "autocast" and "noise:0.1", at most 0.2.
        calibration: further batches; what is measured on them is averaged.
        held_out: a batch to verify the plan on; without it, it is verified on ``batch``.
        learning_rate: of the training, to tell what narrow weights would lose.
        rehearsal: steps of AdamW in float32, on copies of the weights and the batches given,
            before errors are measured: a plan for the model as it is then. Gradients of a model's
            first steps are unlike all later ones; 50 is a good number for one that starts from
            random weights.
        memory: bytes the analysis may keep beside the values that cross between parts of the
            graph; with more of them, fewer parts are run twice. By default as many as the
            moments of AdamW take, which training needs anyway.
        activation_memory: largest number of bytes that a step may keep from its forward to its
            backward pass, such as 4e10 or "40GB".
        sibling: plan of a smaller model of the same kind, to take the errors from instead of
            measuring them.
        overrides: formats to insist on, by glob over site names: ``{"blocks.*.fc.wgrad": "bf16",
            "head.*": "keep fp32"}``; vetoes do not count against them.
        progress: called with a short sentence before each step.

    Raises:
        BudgetError, TargetError, CaptureError, AnalysisError: see there; each says what to do.
    """
    say = progress or silent
    captured, machine, wanted = _opened(model, batch, loss, target, budget, say)
    known = [captured, *map(captured.on, calibration)]
    unseen = [] if held_out is None else [captured.on(held_out)]
    captured, *further = rehearse(known, unseen, rehearsal, learning_rate, say)
    decision = decide(
        captured,
        machine,
        wanted,
        calibration=tuple(further[: len(known) - 1]),
        held_out=further[-1] if unseen else None,
        learning_rate=learning_rate,
        memory=memory,
        most_bytes=inf if activation_memory is None else bytes_of(activation_memory),
        sibling=sibling,
        overrides=overrides,
        progress=say,
    )
    if rehearsal:
        sentence = f"errors are those after {rehearsal} steps of training in float32"
        decision.unit.journal.note("rehearse", sentence)
    return decision.plan(progress=say)


def make_frontier(
    model: nn.Module,
    batch: Any,
    *,
    points: int = 20,
    loss: Loss | None = None,
    target: str | Target = "auto",
    budget: float | str = "auto",
    calibration: Iterable[Any] = (),
    memory: float | None = None,
    sibling: Plan | None = None,
    progress: Progress | None = None,
) -> Frontier:
    """The fastest plans for errors from the smallest to the largest that pays.

    Args:
        model: the module, in the mode it trains in; left as it was.
        batch: as for ``make_plan``.
        points: how many budgets to solve for, 2 or more, beside autocast's error and ``budget``;
            equal plans are listed once.
        loss: as for ``make_plan``.
        target: as for ``make_plan``.
        budget: of the plan that is marked on the frontier, as for ``make_plan``.
        calibration: further batches; what is measured on them is averaged.
        memory: as for ``make_plan``.
        sibling: as for ``make_plan``.
        progress: called with a short sentence before each step.

    Raises:
        BudgetError, TargetError, CaptureError, AnalysisError: see there; each says what to do.
    """
    say = progress or silent
    captured, machine, wanted = _opened(model, batch, loss, target, budget, say)
    batches = tuple(map(captured.on, calibration))
    unit = Unit(captured.joint.copy(), machine, wanted, Journal(), captured, batches, memory=memory)
    _choose(unit, sibling, say)
    found = frontier(
        unit.problem,
        points,
        progress=lambda done, count: say(f"Find the fastest plan for error {done + 1} of {count}"),
        through=(unit.problem.error(unit.baseline), unit.budget.limit),
    )
    return frontier_of_unit(unit, captured.origin, found)


def measure_error(
    model: nn.Module, batch: Any, plan: Plan, *, loss: Loss | None = None
) -> MeasuredError:
    """Run a plan's exact numerics on a batch and compare with float32.

    Works for every plan on any machine: formats are emulated exactly, at float32 speed.

    Args:
        model: the module the plan was made for; left as it was.
        batch: best one that the plan was not made on.
        plan: its plan.
        loss: as for ``make_plan``.

    Raises:
        PlanMismatch: the plan belongs to another model.
        CaptureError: the model fails on the batch.
    """
    captured = capture(model, batch, loss)
    check_plan(plan, captured.joint.sites)
    zero = [flag.site for flag in plan.flags if flag.name == "zero-gradient"]
    totals = plan.totals
    predicted, sigma = totals.predicted_gradient_error, totals.predicted_loss_sigma
    return Truth(captured, zero).measure(plan.assignment, predicted, sigma)


def as_target(target: str | Target, tensors: Iterable[Any] = ()) -> Target:
    """A target itself, or the one with that name; "auto" is where the tensors are.

    Raises:
        TargetError: there is none.
    """
    if isinstance(target, Target):
        return target
    devices = {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}
    if target == "auto" and devices & {"cpu", "cuda"}:
        return Target.load("cuda" if "cuda" in devices else "cpu")
    return Target.load(target)


@dataclass(frozen=True)
class Decision:
    """A captured graph with everything that was found out about it.

    Attributes:
        unit: statistics, prices, flags and the chosen assignment; its graph is as captured.
        captured: the graph and its loss.
        verification: the check of the assignment on a batch.
    """

    unit: Unit
    captured: Captured
    verification: Verification | None

    @property
    def candidates(self) -> dict[str, dict[str, str]]:
        """The solver's assignment, and float32 and autocast's policy where they are allowed."""
        unit, problem = self.unit, self.unit.problem
        others = {"fp32": problem.uniform(), "autocast": unit.baseline}
        legal = {
            label: assignment
            for label, assignment in others.items()
            if not any(problem.violations(assignment))
            and problem.error(assignment) <= unit.budget.limit
        }
        return {"plan": unit.assignment, **legal}

    def plan(self, trial: Trial | None = None, progress: Progress = silent) -> Plan:
        """The plan, rewritten on a copy of the graph to see the result.

        Args:
            trial: measured steps, whose winner gets its formats into the plan.
            progress: called with a short sentence before each step.
        """
        unit, verification = self.unit, self.verification
        solution = unit.solution
        assert solution is not None
        if trial is not None and trial.winner != "plan":
            solution = judged(unit.problem, self.candidates[trial.winner], solution.bound)
            verification = None
        chosen = unit.to_rewrite(self.captured.joint.copy(), solution)
        if trial is not None:
            chosen.journal.note("run-trial", trial.sentence)
        Pipeline(REWRITE, given=frozenset({"assignment"})).run(chosen, progress)
        return plan_of_unit(chosen, self.captured.origin, verification, trial)


def decide(
    captured: Captured,
    target: Target,
    budget: Budget,
    *,
    calibration: tuple[Captured, ...] = (),
    held_out: Captured | None = None,
    learning_rate: float | None = None,
    memory: float | None = None,
    most_bytes: float = inf,
    sibling: Plan | None = None,
    overrides: Mapping[str, str] | None = None,
    vetoes: Mapping[tuple[str, str], str] | None = None,
    progress: Progress = silent,
) -> Decision:
    """Choose the formats of a captured graph and verify them; arguments as of ``make_plan``.

    ``vetoes`` says why a (site, format) is ruled out before anything is measured.
    """
    unit = Unit(
        captured.joint.copy(), target, budget, Journal(), captured, calibration,
        learning_rate=learning_rate, memory=memory, most_bytes=most_bytes,
        overrides=overrides or {}, vetoes=dict(vetoes or {}),
    )  # fmt: skip
    _choose(unit, sibling, progress)
    batch, is_new = (captured, False) if held_out is None else (held_out, True)
    runs = captured.joint.has_values
    verification = verify_plan(unit, batch, is_new, progress) if runs else None
    return Decision(unit, captured, verification)


def plan_for(
    captured: Captured,
    target: Target,
    budget: Budget,
    *,
    held_out: Captured | None = None,
    sibling: Plan | None = None,
) -> Plan:
    """The plan of a captured graph; arguments as of ``make_plan``."""
    return decide(captured, target, budget, held_out=held_out, sibling=sibling).plan()


def _opened(
    model: nn.Module,
    batch: Any,
    loss: Loss | None,
    target: str | Target,
    budget: float | str,
    progress: Progress,
) -> tuple[Captured, Target, Budget]:
    """What all planning begins with; a wrong budget or target is told before the capture."""
    wanted = Budget.parse(budget)
    progress("Load the target")
    machine = as_target(target, model.parameters())
    progress("Capture the joint forward and backward graph")
    return capture(model, batch, loss), machine, wanted


def _choose(unit: Unit, sibling: Plan | None, progress: Progress) -> None:
    """Analyse the graph, or borrow what cannot be measured, and choose formats."""
    borrows = sibling is not None or not unit.joint.has_values
    analyse = BorrowStatistics(sibling) if borrows else MeasureSensitivity()
    Pipeline((analyse, *JUDGE)).run(unit, progress)


def rewritten(joint: JointGraph, plan: Plan) -> fx.GraphModule:
    """The joint graph as the plan has it, on a copy; the sites must match.

    Raises:
        PlanMismatch: the plan belongs to another model; names the first site that differs.
    """
    copy = joint.copy()
    rewrite(copy, plan)
    return copy.module


def lower(model: nn.Module, batch: Any, plan: Plan, *, loss: Loss | None = None) -> Lowered:
    """The training graph as a GPU would run it, by a plan; no GPU is needed.

    Passes run as they do in ``compile``, on GPU tensors without contents, so torch's rules for
    the sizes and layouts of scaled products hold. Without a GPU at hand, the architecture is that
    of the plan's target.

    Args:
        model: the module the plan was made for; left as it was.
        batch: as for ``make_plan``.
        plan: its plan.
        loss: as for ``make_plan``.

    Raises:
        PlanMismatch: the plan belongs to another model.
        CaptureError: the model fails on the batch.
    """
    joint = on_gpu(capture(model, batch, loss).joint)
    journal = rewrite(joint, plan)
    notes = [entry.message for entry in journal.entries if not entry.seconds]
    return Lowered(joint.module, products_of(joint.module.graph), tuple(notes))


def rewrite(
    joint: JointGraph, plan: Plan, *, strict: bool = True, passes: Sequence[Pass] = REWRITE
) -> Journal:
    """Rewrite a joint graph in place as the plan has it.

    Args:
        joint: the graph.
        plan: made for this model, on any batch.
        strict: the sites must match one to one; otherwise sites the plan does not know (another
            batch shape, evaluation mode) stay in float32.
        passes: REWRITE for what this machine runs, EMULATE for the plan's exact numerics.

    Raises:
        PlanMismatch: the plan belongs to another model; names the first site that differs.
    """
    sites = find_sites(joint.module.graph, joint.parameters, joint.saved)
    if strict:
        check_plan(plan, sites)
    journal = Journal()
    architecture = architecture_for(plan.target)
    machine = shipped(plan.target)
    unit = Unit(
        joint, machine, plan.budget, journal, assignment=plan.assignment, architecture=architecture
    )
    Pipeline(passes, given=frozenset({"assignment"})).run(unit)
    return journal
