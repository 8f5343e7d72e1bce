"""A synthetic plan of a large model, quick to make, in the shape that real ones have."""

from precision_compiler.flags import Flag
from precision_compiler.journal import JournalEntry
from precision_compiler.plan import (
    SCHEMA_VERSION,
    Budget,
    NodeChoice,
    Option,
    Plan,
    SiteChoice,
    Totals,
)

MODULES = ("attn.qkv", "attn.sdpa", "attn.out", "fc", "proj")
ROLES = ("fprop", "dgrad", "wgrad")
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


def _node(number: int, name: str) -> NodeChoice:
    reason = "fuses into a kernel that computes in float32 registers"
    return NodeChoice(f"node_{number}", "mul", name, "fp32", "bf16", reason, 1e-6, 1e-5)
