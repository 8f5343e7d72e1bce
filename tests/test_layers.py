"""Imports point one way: a module may import its own layer and those below it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up. A folder stands for everything in it that is not named on its own.
LAYERS = (
    {
        "adjoints",
        "budget",
        "calibrated",
        "codes",
        "delayed",
        "elements",
        "errors",
        "facts",
        "files",
        "flags",
        "format_rates",
        "format_tables",
        "formats",
        "gemm",
        "gemm_formats",
        "gpu",
        "hadamard",
        "heap",
        "journal",
        "limited",
        "measure",
        "observation",
        "operand_errors",
        "origin",
        "outcomes",
        "outliers",
        "packing",
        "rounding",
        "sampling",
        "scaled",
        "scaled_calls",
        "scales",
        "scaling",
        "signs",
        "sizes",
        "statistics",
        "tables",
        "tf32",
        "target",
        "target_files",
        "toolchain",
        "watched",
        "workload",
    },
    {
        "accumulation",
        "arithmetic",
        "attention",
        "calling",
        "capture",
        "chunks",
        "composed",
        "edit",
        "emulation",
        "exactness",
        "flips",
        "float32_noise",
        "graph",
        "importing",
        "joint",
        "links",
        "noise",
        "overrides",
        "paper",
        "explain",
        "fitting",
        "frontier",
        "parts",
        "plan",
        "pipeline",
        "probe",
        "problem",
        "program",
        "reach",
        "record",
        "reductions",
        "rehearsal",
        "replay",
        "running_sums",
        "sites",
        "fusion",
        "tape",
        "thaw",
        "trial",
        "solver",
        "sweep",
        "tradeoff",
        "verify",
        "wide_casts",
    },
    {"kernels"},
    {"lowering"},
    {"passes.analyse", "passes.assign", "passes.cost", "passes.lower", "passes.rewrite"},
    {"passes"},
    {"verification"},
    {"backend", "compiler"},
    {"report", "export"},
    {"annotate"},
    # "" is the package itself with its public names
    {"", "cli", "cli_annotate", "cli_common", "cli_gpu", "cli_plans", "demo", "__main__"},
)


def module_files() -> dict[str, Path]:
    """Every module by its name inside the package."""
    found = {}
    for folder, prefix in ((ROOT / "precision_compiler", ()), (ROOT / "passes", ("passes",))):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts).removesuffix("__init__").removesuffix(".")
            found[name] = path
    return found


MODULES = module_files()


def layer_of(name: str) -> int:
    """The layer of a module, by the longest entry of LAYERS that it lies in."""
    while True:
        for level, names in enumerate(LAYERS):
            if name in names:
                return level
        if not name:
            raise LookupError(name)
        name = name.rpartition(".")[0]


def imported_modules(path: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                is_module = submodule.removeprefix("precision_compiler.") in MODULES
                found.add(submodule if is_module else str(node.module))
    inside = {name for name in found if f"{name}.".startswith("precision_compiler.")}
    return {name.removeprefix("precision_compiler").removeprefix(".") for name in inside}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_module_imports_no_higher_layer(name: str) -> None:
    level = layer_of(name)
    above = {other for other in imported_modules(MODULES[name]) if layer_of(other) > level}
    assert not above, f"{name or 'the package'} is in layer {level} and imports {sorted(above)}"


@pytest.mark.parametrize("name", sorted(set(MODULES) - {""}))
def test_module_has_a_layer_of_its_own(name: str) -> None:
    top = name.split(".")[0]
    assert any(top in names for names in LAYERS), f"give {top} a place in LAYERS"


def test_reports_read_plans_and_targets_and_run_nothing() -> None:
    readable = {
        "errors",
        "explain",
        "fitting",
        "files",
        "flags",
        "formats",
        "frontier",
        "journal",
        "outcomes",
        "outliers",
        "plan",
        "report",
        "sizes",
        "target",
    }
    for name, path in MODULES.items():
        if name.split(".")[0] == "report":
            assert {other.split(".")[0] for other in imported_modules(path)} <= readable
