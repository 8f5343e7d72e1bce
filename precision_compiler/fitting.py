"""Whether a plan belongs to a graph: site by site, with the first difference named."""

from precision_compiler.errors import PlanMismatch
from precision_compiler.plan import Plan
from precision_compiler.sites import Site, fingerprint


def check_plan(plan: Plan, sites: tuple[Site, ...]) -> None:
    """Compare a plan's contraction sites with a graph's.

    Raises:
        PlanMismatch: names the first site that the other side lacks or has in another shape.
    """
    found = {site.name: site for site in sites if site.kind == "contraction"}
    planned = {name: site for name, site in plan.sites.items() if site.kind == "contraction"}
    advice = "make a plan for this model with make_plan"
    for name, choice in planned.items():
        if name not in found:
            raise PlanMismatch(f"the plan has a site {name} that this model lacks: {advice}")
        if found[name].signature != choice.signature:
            raise PlanMismatch(
                f"site {name} is {found[name].signature} in this model but {choice.signature} in "
                f"the plan: {advice}"
            )
    for name in found:
        if name not in planned:
            raise PlanMismatch(f"this model has a site {name} that the plan lacks: {advice}")
    if fingerprint(sites) != plan.fingerprint:
        raise PlanMismatch(f"the plan's sites are those of this model in another order: {advice}")


def check_forward(plan: Plan, sites: tuple[Site, ...]) -> None:
    """Compare the contractions of a forward graph with a plan, which may know more.

    Raises:
        PlanMismatch: names the first contraction that the plan lacks or has in another shape.
    """
    for site in sites:
        choice = plan.sites.get(site.name)
        if site.kind == "contraction" and (choice is None or choice.signature != site.signature):
            known = "lacks it" if choice is None else f"has {choice.signature}"
            raise PlanMismatch(
                f"site {site.name} is {site.signature} in this model but the plan {known}: make a "
                "plan for this model with make_plan"
            )
