"""Plans made up for tests: a large one in the shape of real ones, one with hostile names."""

from dataclasses import replace

from precision_compiler.budget import Budget
from precision_compiler.flags import Flag
from precision_compiler.journal import JournalEntry
from precision_compiler.outcomes import Totals
from precision_compiler.plan import SCHEMA_VERSION, NodeChoice, Option, Plan, SiteChoice

MODULES = ("attn.qkv", "attn.sdpa", "attn.out", "fc", "proj")
ROLES = ("fprop", "dgrad", "wgrad")
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028 & '\"<!--"
FORMATS = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")


def site(kind: str, role: str, number: int) -> SiteChoice:
    """A site whose format and numbers vary with its number."""
    options = {
        name: Option(1e-5 / (place + 1), 1e-5 * 4**place, "it overflows" if place == 5 else None)
        for place, name in enumerate(FORMATS)
    }
    chosen = FORMATS[number % 5]
    return SiteChoice(
        kind=kind,  # type: ignore[arg-type]
        role=role,  # type: ignore[arg-type]
        op="mm",
        signature="mm[4096, 4096]",
        shape=(4096, 4096),
        format=chosen,
        reason=f"{chosen} is the fastest format within the error budget, neighbours considered",
        seconds=options[chosen].seconds * (1 + number % 7),
        error=options[chosen].error,
        variance_share=(number % 11) ** 3 * 1e-7,
        options=options,
    )


def big_plan(sites: int, nodes: int) -> Plan:
    """A plan with so many sites, 30 a layer, and nodes."""
    places = [
        (f"blocks.{number // 30}.{MODULES[number // 6 % 5]}.{ROLES[number // 2 % 3]}", number)
        for number in range(sites)
    ]
    choices = {}
    for name, number in places:
        role = name.rpartition(".")[2]
        if number % 2:
            choices[f"{name}.store"] = site("storage", "store", number)
        else:
            choices[name] = site("contraction", role, number)
    names = list(choices)
    return Plan(
        schema_version=SCHEMA_VERSION,
        target="h100",
        budget=Budget("0.05", 0.05, "set by the user"),
        fingerprint="0123456789abcdef",
        loss_origin="the model's own loss",
        versions={},
        totals=Totals(0.3, 0.04, 0.29, 0.03, 0.8, 0.4, 0.01, 900, 1e-4, None, 0.7, 2.5, 1),
        sites=choices,
        nodes=tuple(_node(number, names[number % len(names)]) for number in range(nodes)),
        journal=(JournalEntry("choose-formats", "Find the fastest assignment", 0.5, 10, 12),),
        flags=tuple(
            Flag("overflow", name, "e5m2", f"{name} overflows", {}, True) for name in names[::10]
        ),
    )


def with_names(plan: Plan, name: str) -> Plan:
    """The plan with a hostile name wherever text of a model may stand."""
    site = next(iter(plan.sites.values()))
    sites = {**plan.sites, name: replace(site, reason=name, op=name, signature=name)}
    flag = Flag("overflow", name, "fp16", name, {}, True)
    nodes = (*plan.nodes, replace(plan.nodes[0], name=name, site=name, reason=name))
    return replace(plan, target=name, loss_origin=name, sites=sites, flags=(flag,), nodes=nodes)


def _node(number: int, name: str) -> NodeChoice:
    reason = "fuses into a kernel that computes in float32 registers"
    return NodeChoice(f"node_{number}", "mul", name, "fp32", "bf16", reason, 1e-6, 1e-5)
