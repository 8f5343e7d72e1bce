"""Write down what a unit decided, as a plan."""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import metadata
from math import isfinite

import numpy as np
import torch
from torch import fx

from precision_compiler.budget import TRUST_REGION
from precision_compiler.errors import InternalError
from precision_compiler.facts import facts_of
from precision_compiler.flags import Flag
from precision_compiler.formats import format_of_dtype
from precision_compiler.frontier import FRONTIER_VERSION, Frontier, FrontierPoint
from precision_compiler.graph import base_name, is_movement, value_of
from precision_compiler.links import Links
from precision_compiler.outcomes import Totals, Trial, Verification
from precision_compiler.overrides import OVERRIDE
from precision_compiler.pipeline import Unit
from precision_compiler.plan import SCHEMA_VERSION, NodeChoice, Option, Plan, Range, SiteChoice
from precision_compiler.problem import Problem, Solution, fixes_result
from precision_compiler.sites import Site, fingerprint
from precision_compiler.statistics import EXPONENTS, METRICS
from precision_compiler.sweep import frontier
from precision_compiler.thaw import problem_of, tables_of
from precision_compiler.verify import is_ours

TENSOR, LOSS = METRICS.index("tensor"), METRICS.index("loss")


def plan_of_unit(
    unit: Unit,
    loss_origin: str,
    verification: Verification | None = None,
    trial: Trial | None = None,
) -> Plan:
    """The plan of a unit whose graph is rewritten."""
    if unit.solution is None:
        raise InternalError("a plan is written before its formats are chosen")
    problem, solution = unit.problem, unit.solution
    variances = problem.variances(solution.assignment)
    reason = trial.sentence if trial is not None and trial.winner != "plan" else None
    total = sum(variances.values())
    sites = {
        site.name: _site_choice(site, unit, variances, total, reason) for site in unit.joint.sites
    }
    graph = unit.joint.module.graph
    return Plan(
        schema_version=SCHEMA_VERSION,
        target=unit.target.name,
        budget=unit.budget,
        fingerprint=fingerprint(unit.joint.sites),
        loss_origin=loss_origin,
        versions=versions(),
        totals=replace(
            _totals(unit, problem, solution),
            calibrated=trial.calibrated if trial is not None else None,
        ),
        sites=sites,
        nodes=node_choices(graph, sites, _vetoes_by_node(unit)),
        journal=tuple(unit.journal.entries),
        flags=(*unit.flags, *flags_of_plan(solution, verification)),
        verification=verification,
        trial=trial,
        tables=tables_of(problem, unit.baseline),
        measures="outputs" if unit.joint.inference else "gradients",
    )


def frontier_of_unit(unit: Unit, loss_origin: str, points: Sequence[Solution]) -> Frontier:
    """The frontier of a unit whose formats are chosen."""
    if unit.solution is None:
        raise InternalError("a frontier is written before formats are chosen")
    problem = unit.problem
    return Frontier(
        schema_version=FRONTIER_VERSION,
        target=unit.target.name,
        fingerprint=fingerprint(unit.joint.sites),
        loss_origin=loss_origin,
        versions=versions(),
        fp32=_unproven(problem, problem.uniform()),
        autocast=_unproven(problem, unit.baseline),
        budget=unit.budget,
        chosen=_frontier_point(problem, unit.solution),
        points=tuple(_frontier_point(problem, solution) for solution in points),
    )


def frontier_of_plan(
    plan: Plan,
    points: int = 12,
    seconds: float = 20.0,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> Frontier:
    """The fastest plans for other errors, from what a plan was decided on.

    Args:
        plan: carries its decision problem.
        points: how many budgets to solve for.
        seconds: time limit; the points found by then are returned.
        progress: called with the number of budgets done and of all.

    Raises:
        PlanError: the plan does not carry its problem.
    """
    problem = problem_of(plan)
    assert plan.tables is not None
    through = problem.error(plan.tables.autocast), plan.budget.limit
    found, totals = frontier(problem, points, 1e-2, seconds, progress, through), plan.totals
    best = totals.predicted_seconds, totals.predicted_gradient_error, totals.bound_seconds
    chosen = Solution(plan.assignment, *best, totals.gap)
    return Frontier(
        schema_version=FRONTIER_VERSION,
        target=plan.target,
        fingerprint=plan.fingerprint,
        loss_origin=plan.loss_origin,
        versions=plan.versions,
        fp32=_unproven(problem, problem.uniform()),
        autocast=replace(
            _unproven(problem, plan.tables.autocast), error=totals.autocast_gradient_error
        ),
        budget=plan.budget,
        chosen=_frontier_point(problem, chosen),
        points=tuple(_frontier_point(problem, solution) for solution in found),
    )


def _unproven(problem: Problem, assignment: Mapping[str, str]) -> FrontierPoint:
    seconds, error = problem.seconds(assignment), problem.expected_error(assignment)
    return _frontier_point(problem, Solution(assignment, seconds, error, 0.0, 1.0))


def _frontier_point(problem: Problem, solution: Solution) -> FrontierPoint:
    chosen, links = solution.assignment, problem.links
    return FrontierPoint(
        error=solution.error,
        seconds=solution.seconds,
        bound_seconds=solution.bound,
        gap=solution.gap,
        contractions=Counter(chosen[name] for name in links.contractions),
        stores=Counter(chosen[name] for name in links.stores),
    )


def _vetoes_by_node(unit: Unit) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for (place, fmt), reason in unit.vetoes.items():
        found.setdefault(place.removesuffix(".store"), {})[fmt] = reason
    return found


def flags_of_plan(solution: Solution, verification: Verification | None) -> Iterator[Flag]:
    """Flags about a whole plan: predicted beyond what can be trusted, or not verified."""
    if solution.error > TRUST_REGION:
        sentence = (
            f"the predicted error {solution.error:.2g} is beyond {TRUST_REGION:g}, up to which "
            "first-order analysis was found to hold: trust the measured error instead"
        )
        numbers = {"error": solution.error, "trust_region": TRUST_REGION}
        yield Flag("trust-region", "", None, sentence, numbers, False)
    if verification is not None and not verification.passed:
        measured = verification.measured
        sentence = (
            f"measured error {measured.gradient_error:.2g}, predicted "
            f"{measured.predicted_gradient_error:.2g}, after {verification.rounds} rounds: make "
            "the plan again with a smaller budget or more calibration batches"
        )
        numbers = {
            "measured": measured.gradient_error,
            "predicted": measured.predicted_gradient_error,
        }
        yield Flag("unverified", "", None, sentence, numbers, False)


def node_choices(
    graph: fx.Graph,
    sites: Mapping[str, SiteChoice],
    vetoes: Mapping[str, Mapping[str, str]] | None = None,
) -> tuple[NodeChoice, ...]:
    """One entry per computing node of a rewritten graph, in its order."""
    known = vetoes or {}
    calls = (node for node in graph.nodes if node.op == "call_function")
    return tuple(_node_choice(node, sites, known) for node in calls)


def versions() -> dict[str, str]:
    """Versions of what makes a plan."""
    return {
        "precision_compiler": metadata.version("precision_compiler"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _totals(unit: Unit, problem: Problem, solution: Solution) -> Totals:
    return Totals(
        predicted_seconds=solution.seconds,
        predicted_gradient_error=solution.error,
        bound_seconds=solution.bound,
        gap=solution.gap,
        fp32_seconds=problem.seconds(problem.uniform()),
        autocast_seconds=problem.seconds(unit.baseline),
        autocast_gradient_error=problem.expected_error(unit.baseline),
        casts=len(problem.casts(solution.assignment)),
        predicted_loss_sigma=problem.error(solution.assignment, LOSS),
        predicted_tensor_error=_tensor_error(problem, solution),
        gradient_norm=problem.statistics.gradient_norm,
        loss=problem.statistics.loss,
        batches=problem.statistics.batches,
        activation_bytes=problem.activation_bytes(solution.assignment),
        fp32_activation_bytes=problem.activation_bytes(problem.uniform()),
        autocast_activation_bytes=problem.activation_bytes(unit.baseline),
    )


def _tensor_error(problem: Problem, solution: Solution) -> float | None:
    asked = any(seen.weight[TENSOR].any() for seen in problem.statistics.stores.values())
    return problem.error(solution.assignment, TENSOR) if asked else None


def _site_choice(
    site: Site, unit: Unit, variances: dict[str, float], total: float, why: str | None
) -> SiteChoice:
    problem = unit.problem
    chosen = unit.assignment[site.name]
    prices = unit.store_prices if site.kind == "storage" else unit.contraction_prices
    options = {
        name: Option(
            prices[site.name][name],
            _variance_alone(problem, site, name) ** 0.5,
            unit.vetoes.get((site.name, name)),
        )
        for name in unit.formats_for(site.kind)
    }
    return SiteChoice(
        kind=site.kind,
        role=site.role,
        op=site.op,
        signature=site.signature,
        shape=site.shape,
        format=chosen,
        reason=_override(site, unit)
        or why
        or reason_for(site.name, options, unit.links, unit.assignment),
        seconds=options[chosen].seconds,
        error=max(0.0, variances[site.name]) ** 0.5,
        variance_share=variances[site.name] / total if total else 0.0,
        options=options,
        ranges=tuple(_ranges(site, problem)),
    )


def _ranges(site: Site, problem: Problem) -> Iterator[Range]:
    """Binade histograms of a site's tensors, as far as they were measured."""
    statistics = problem.statistics
    if site.kind == "storage":
        named = [("stored", statistics.stores.get(site.name))]
    else:
        arguments = sorted(link.argument for link in problem.links.reads_of(site.name))
        named = [
            (f"operand {argument}", statistics.operands.get((site.name, argument)))
            for argument in arguments
        ]
    for name, seen in named:
        total = 0.0 if seen is None else float(seen.count.sum())
        if seen is None or not total or not isfinite(seen.amax):
            continue
        first, last = np.flatnonzero(seen.count)[[0, -1]]
        shares = (round(float(count) / total, 5) for count in seen.count[first : last + 1])
        yield Range(name, float(seen.amax), int(EXPONENTS[first]), tuple(shares))


def _variance_alone(problem: Problem, site: Site, name: str) -> float:
    """Variance a site causes in a format while everything around it is float32."""
    if site.kind == "storage":
        return problem.store_variance(site.name, name)
    reads = problem.links.reads_of(site.name)
    arguments = sum(problem.link_variance(link, name) for link in reads)
    return arguments + problem.internal_variance(site.name, name)


def _override(site: Site, unit: Unit) -> str | None:
    pattern = unit.insisted.get(site.name, ("", ""))[0]
    return f"{OVERRIDE} {pattern!r}" if pattern else None


def reason_for(
    site: str, options: Mapping[str, Option], links: Links, assignment: Mapping[str, str]
) -> str:
    """A sentence on why a site has its format in an assignment."""
    chosen, writer = assignment[site], links.writer.get(site)
    returned = assignment[writer] if writer is not None else "fp32"
    if returned == chosen != "fp32" and fixes_result(returned):
        return f"the format that {writer} returns"
    faster = {
        name: option for name, option in options.items() if option.seconds < options[chosen].seconds
    }
    if not faster:
        return "fastest of the formats considered"
    open_ones = [name for name, option in faster.items() if option.veto is None]
    if not open_ones:
        name, option = next(iter(faster.items()))
        return f"{name} would be faster but is ruled out: {option.veto}"
    return (
        f"{' and '.join(open_ones)} would be faster here but cost more in casts, neighbouring "
        "formats or error budget than they save"
    )


def _node_choice(
    node: fx.Node,
    sites: Mapping[str, SiteChoice],
    vetoes: Mapping[str, Mapping[str, str]],
) -> NodeChoice:
    facts = facts_of(node)
    name = facts.name if facts else node.name
    contraction, store = sites.get(name), sites.get(f"{name}.store")
    stored = _stored_format(node)
    if contraction is not None:
        computed, reason = contraction.format, contraction.reason
    elif is_movement(node):
        computed, reason = stored, "moves elements, computes nothing"
    elif is_ours(node) and facts is not None:
        computed, reason = stored, f"cast: {facts.reason}"
    else:
        computed = "fp32" if stored in ("bf16", "fp16") else stored
        reason = "fuses into a kernel that computes in float32 registers"
    owner = contraction or store
    return NodeChoice(
        name=name,
        op=base_name(node.target),
        site=None if owner is None else (name if contraction else f"{name}.store"),
        compute_format=computed,
        storage_format=stored,
        reason=store.reason if store and not contraction else reason,
        seconds=sum(choice.seconds for choice in (contraction, store) if choice),
        error=sum(choice.error**2 for choice in (contraction, store) if choice) ** 0.5,
        vetoes=vetoes.get(name, {}),
    )


def _stored_format(node: fx.Node) -> str:
    value = value_of(node)
    if value is None:
        leaves = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        tensors = [item for item in leaves if isinstance(item, torch.Tensor)]
        if not tensors:
            return "none"
        value = tensors[0]
    fmt = format_of_dtype(value.dtype)
    return fmt.name if fmt else str(value.dtype).rpartition(".")[2]
