"""Why a site has its format, and what any other would cost: by solving again."""

from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import inf, isclose
from typing import Literal

from precision_compiler.calibrated import Calibrated
from precision_compiler.errors import BudgetError, PlanError
from precision_compiler.overrides import OVERRIDE
from precision_compiler.plan import Plan, SiteChoice
from precision_compiler.problem import Problem, Solution, fixes_result
from precision_compiler.solver import solve
from precision_compiler.thaw import problem_of

GAP = 1e-4
"""Relative gap to which the problem is solved again."""

Binding = Literal["override", "fastest", "veto", "result", "budget", "casts", "trial"]


@dataclass(frozen=True)
class Alternative:
    """One format forced on a site, everything else decided anew.

    Attributes:
        format: the format.
        seconds: predicted time of the whole step then; None if nothing fits the budget.
        seconds_more: how much longer that is than the best without the force.
        error: predicted gradient error of the whole plan then.
        changed: other sites that get another format than they have in the plan.
        veto: why the format was ruled out; what it costs is said all the same.
    """

    format: str
    seconds: float | None
    seconds_more: float | None
    error: float | None
    changed: tuple[str, ...]
    veto: str | None


@dataclass(frozen=True)
class Explanation:
    """Why a site has its format.

    Attributes:
        site: its name.
        format: the chosen format.
        binding: what decided: "override" (the user), "veto" (a faster one is ruled out), "result"
            (the format that its contraction returns), "budget" (with more error allowed it would
            be another), "casts" (another is faster by itself but not with its copies and
            neighbours), "fastest", or "trial" (measured steps decided).
        sentence: the same for people.
        alternatives: every format considered, in the order of the plan.
        calibrated: what corrects their seconds by measured steps; None without a trial.
    """

    site: str
    format: str
    binding: Binding
    sentence: str
    alternatives: tuple[Alternative, ...]
    calibrated: Calibrated | None = None


def explain(plan: Plan, site: str) -> Explanation:
    """Explain one site of a plan.

    Raises:
        PlanError: there is no such site, or the plan does not carry its decision problem.
    """
    if site not in plan.sites:
        near = get_close_matches(site, plan.sites, n=3, cutoff=0.4)
        guess = f"; did you mean {' or '.join(near)}?" if near else ""
        raise PlanError(f"the plan has no site {site}{guess}")
    problem, choice = problem_of(plan), plan.sites[site]
    limit = plan.budget.limit
    best = solve(problem, limit, GAP)
    alternatives = tuple(_alternative(plan, problem, site, fmt, best) for fmt in choice.options)
    binding, why = _binding(plan, problem, site, choice)
    rule = plan.totals.calibrated
    return Explanation(site, choice.format, binding, why, alternatives, rule)


def forced(problem: Problem, site: str, fmt: str) -> Problem:
    """The problem with one format left for a site, vetoed or not."""
    return replace(problem, options={**problem.options, site: (fmt,)})


def _longer(seconds: float, best: float) -> float:
    """The difference, unless it comes from adding up the same prices in another order."""
    return 0.0 if seconds <= best or isclose(seconds, best, rel_tol=1e-12) else seconds - best


def _alternative(plan: Plan, problem: Problem, site: str, fmt: str, best: Solution) -> Alternative:
    veto = plan.sites[site].options[fmt].veto
    if fmt == plan.sites[site].format:
        more = _longer(plan.predicted_seconds, best.seconds)
        return Alternative(
            fmt, plan.predicted_seconds, more, plan.predicted_gradient_error, (), veto
        )
    try:
        found = solve(forced(problem, site, fmt), plan.budget.limit, GAP)
    except BudgetError:
        return Alternative(fmt, None, None, None, (), veto)
    changed = tuple(
        name
        for name, chosen in found.assignment.items()
        if name != site and chosen != plan.sites[name].format
    )
    more = _longer(found.seconds, best.seconds)
    return Alternative(fmt, found.seconds, more, found.error, changed, veto)


def _binding(plan: Plan, problem: Problem, site: str, choice: SiteChoice) -> tuple[Binding, str]:
    chosen = choice.format
    if choice.reason.startswith(OVERRIDE):
        return "override", choice.reason
    if plan.trial is not None and plan.trial.winner != "plan":
        return "trial", plan.trial.sentence
    writer = problem.links.writer.get(site)
    if writer is not None and plan.sites[writer].format == chosen and fixes_result(chosen):
        return "result", f"{chosen} is the format that {writer} returns"
    faster = {
        fmt: option for fmt, option in choice.options.items() if option.seconds < choice.seconds
    }
    ruled_out = {fmt: option.veto for fmt, option in faster.items() if option.veto is not None}
    if not faster:
        return "fastest", f"{chosen} is the fastest of the formats considered"
    if len(ruled_out) == len(faster):
        fmt, reason = next(iter(ruled_out.items()))
        return "veto", f"{fmt} would be faster but is ruled out: {reason}"
    free = solve(problem, inf, GAP).assignment[site]
    if free != chosen:
        return "budget", (
            f"with any error allowed it would be {free}, but the budget of "
            f"{plan.budget.limit:.2g} ({plan.budget.bound_by}) is spent better elsewhere"
        )
    open_ones = [fmt for fmt in faster if fmt not in ruled_out]
    each = "by themselves, but cost" if len(open_ones) > 1 else "by itself, but costs"
    return "casts", (
        f"{' and '.join(open_ones)} would be faster {each} more in casts and neighbouring formats"
    )
