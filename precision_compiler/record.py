"""Write down what a unit decided, as a plan."""

import platform
from collections.abc import Mapping
from importlib import metadata

import torch
from torch import fx

from precision_compiler.errors import InternalError
from precision_compiler.facts import facts_of
from precision_compiler.formats import format_of_dtype
from precision_compiler.graph import base_name, is_movement, value_of
from precision_compiler.pipeline import Unit
from precision_compiler.plan import (
    SCHEMA_VERSION,
    NodeChoice,
    Option,
    Plan,
    SiteChoice,
    Totals,
)
from precision_compiler.problem import Problem, Solution, fixes_result
from precision_compiler.sites import Site, fingerprint
from precision_compiler.verify import is_ours


def plan_of_unit(unit: Unit, loss_origin: str) -> Plan:
    """The plan of a unit whose graph is rewritten."""
    if unit.solution is None:
        raise InternalError("a plan is written before its formats are chosen")
    problem, solution = unit.problem, unit.solution
    variances = problem.variances(solution.assignment)
    sites = {site.name: _site_choice(site, unit, variances) for site in unit.joint.sites}
    graph = unit.joint.module.graph
    return Plan(
        schema_version=SCHEMA_VERSION,
        target=unit.target.name,
        budget=unit.budget,
        fingerprint=fingerprint(unit.joint.sites),
        loss_origin=loss_origin,
        versions=versions(),
        totals=_totals(unit, problem, solution, sum(map(is_ours, graph.nodes))),
        sites=sites,
        nodes=node_choices(graph, sites),
        journal=tuple(unit.journal.entries),
    )


def node_choices(graph: fx.Graph, sites: Mapping[str, SiteChoice]) -> tuple[NodeChoice, ...]:
    """One entry per computing node of a rewritten graph, in its order."""
    return tuple(_node_choice(node, sites) for node in graph.nodes if node.op == "call_function")


def versions() -> dict[str, str]:
    """Versions of what makes a plan."""
    return {
        "precision_compiler": metadata.version("precision_compiler"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _totals(unit: Unit, problem: Problem, solution: Solution, casts: int) -> Totals:
    return Totals(
        predicted_seconds=solution.seconds,
        predicted_gradient_error=solution.error,
        bound_seconds=solution.bound,
        gap=solution.gap,
        fp32_seconds=problem.seconds(problem.uniform()),
        autocast_seconds=problem.seconds(unit.baseline),
        autocast_gradient_error=problem.error(unit.baseline),
        casts=casts,
    )


def _site_choice(site: Site, unit: Unit, variances: dict[str, float]) -> SiteChoice:
    problem, norm = unit.problem, unit.problem.statistics.gradient_norm
    chosen = unit.assignment[site.name]
    prices = unit.store_prices if site.kind == "storage" else unit.contraction_prices
    options = {
        name: Option(
            prices[site.name][name],
            _variance_alone(problem, site, name) ** 0.5 / norm,
            unit.vetoes.get((site.name, name)),
        )
        for name in unit.formats_for(site.kind)
    }
    total = sum(variances.values())
    return SiteChoice(
        kind=site.kind,
        role=site.role,
        op=site.op,
        signature=site.signature,
        shape=site.shape,
        format=chosen,
        reason=_reason(site, chosen, options, unit),
        seconds=options[chosen].seconds,
        error=variances[site.name] ** 0.5 / norm,
        variance_share=variances[site.name] / total if total else 0.0,
        options=options,
    )


def _variance_alone(problem: Problem, site: Site, name: str) -> float:
    """Variance a site causes in a format while everything around it is float32."""
    if site.kind == "storage":
        return problem.store_variance(site.name, name)
    reads = problem.links.reads_of(site.name)
    arguments = sum(problem.link_variance(link, name) for link in reads)
    return arguments + problem.internal_variance(site.name, name)


def _reason(site: Site, chosen: str, options: dict[str, Option], unit: Unit) -> str:
    writer = unit.links.writer.get(site.name)
    returned = unit.assignment[writer] if writer is not None else "fp32"
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


def _node_choice(node: fx.Node, sites: Mapping[str, SiteChoice]) -> NodeChoice:
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
