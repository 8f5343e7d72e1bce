"""Change a plan: insist on formats, decide the rest anew, without the model."""

from collections.abc import Mapping
from dataclasses import replace

from precision_compiler.explain import GAP
from precision_compiler.journal import JournalEntry
from precision_compiler.overrides import OVERRIDE, resolved
from precision_compiler.plan import NodeChoice, Plan, SiteChoice
from precision_compiler.problem import Problem, Solution
from precision_compiler.record import flags_of_plan, reason_for
from precision_compiler.solver import solve
from precision_compiler.thaw import problem_of

_OF_THE_WHOLE = ("trust-region", "unverified")


def edit(plan: Plan, overrides: Mapping[str, str]) -> Plan:
    """A plan with formats that the user insists on, everything else decided anew.

    The problem is the one that the plan carries: no model, no measurement. Overrides of the plan
    stay unless a new one is about the same site; vetoes do not count against them. The result is
    not verified: ``measure_error(model, batch, plan)`` does that. Its predicted loss sigma is that
    of the plan in proportion to the errors.

    Args:
        plan: carries its decision problem.
        overrides: format by glob over site names: ``{"blocks.*.fc.wgrad": "bf16"}``.

    Raises:
        PlanError: a pattern matches no site, patterns contradict each other, a format is none for
            a site, or the plan does not carry its problem.
        BudgetError: nothing within the budget has these formats.
    """
    problem = problem_of(plan)
    sites = {**problem.links.contractions, **problem.links.stores}
    kinds = {
        kind: dict.fromkeys(
            fmt for one in plan.sites.values() if one.kind == kind for fmt in one.options
        )
        for kind in ("contraction", "storage")
    }
    insisted = resolved(overrides, (sites[name] for name in plan.sites), kinds)
    options = {**problem.options, **{site: (fmt,) for site, (_, fmt) in insisted.items()}}
    changed = replace(problem, options=options)
    solution = solve(changed, plan.budget.limit, GAP)
    patterns = {site: pattern for site, (pattern, _) in insisted.items()}
    return _rewritten(plan, changed, solution, patterns)


def _rewritten(
    plan: Plan, problem: Problem, solution: Solution, patterns: Mapping[str, str]
) -> Plan:
    variances = problem.variances(solution.assignment)
    total = sum(variances.values())
    sites = {}
    for name, one in plan.sites.items():
        share = variances[name] / total if total else 0.0
        reason = _reason(name, one, problem, solution, patterns)
        chosen = solution.assignment[name]
        sites[name] = replace(
            one, format=chosen, reason=reason, seconds=one.options[chosen].seconds,
            error=max(0.0, variances[name]) ** 0.5, variance_share=share,
        )  # fmt: skip
    before, assignment = plan.totals, solution.assignment
    growth = solution.error / plan.predicted_gradient_error if plan.predicted_gradient_error else 0
    totals = replace(
        before,
        predicted_seconds=solution.seconds,
        predicted_gradient_error=solution.error,
        bound_seconds=solution.bound,
        gap=solution.gap,
        casts=len(problem.casts(assignment)),
        predicted_loss_sigma=before.predicted_loss_sigma * growth,
        predicted_tensor_error=None,
        activation_bytes=problem.activation_bytes(assignment),
    )
    flags = [flag for flag in plan.flags if flag.name not in _OF_THE_WHOLE]
    words = ", ".join(f"{pattern} = {assignment[site]}" for site, pattern in patterns.items())
    return replace(
        plan,
        totals=totals,
        sites=sites,
        nodes=tuple(_node(node, sites) for node in plan.nodes if not _is_cast(node)),
        journal=(*plan.journal, JournalEntry("edit", f"decided anew with {words}")),
        flags=(*flags, *flags_of_plan(solution, None)),
        verification=None,
        trial=None,
    )


def _reason(
    name: str, one: SiteChoice, problem: Problem, solution: Solution, patterns: Mapping[str, str]
) -> str:
    if name in patterns:
        return f"{OVERRIDE} {patterns[name]!r}"
    if one.reason.startswith(OVERRIDE):
        return one.reason
    return reason_for(name, one.options, problem.links, solution.assignment)


def _is_cast(node: NodeChoice) -> bool:
    return node.reason.startswith("cast: ")


def _node(node: NodeChoice, sites: Mapping[str, SiteChoice]) -> NodeChoice:
    """What a node computes and stores in, by its sites; others stay as they are."""
    contraction, store = sites.get(node.name), sites.get(f"{node.name}.store")
    known = [site for site in (contraction, store) if site is not None]
    if not known:
        return node
    return replace(
        node,
        compute_format=contraction.format if contraction else node.compute_format,
        storage_format=store.format if store else node.storage_format,
        reason=known[0].reason,
        seconds=sum(site.seconds for site in known),
        error=sum(site.error**2 for site in known) ** 0.5,
    )
