"""Machines as data: rates per format, memory, launch cost; one TOML file each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from importlib import resources
from math import inf
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from precision_compiler.errors import TargetError
from precision_compiler.format_rates import QUANTISATIONS, FormatRate, Quantisation
from precision_compiler.formats import CHOICES
from precision_compiler.gemm import Product, gemm_seconds
from precision_compiler.gemm_formats import GEMM_BYTES, nearest
from precision_compiler.gpu import architecture_name, gpu_at_hand
from precision_compiler.measure import Machine, measured_machine
from precision_compiler.scaling import RECIPES, SCALE_BITS, SCALED_FORMATS, hardware_format
from precision_compiler.target_files import SUFFIX, Table, explain, read_table

__all__ = ["QUANTISATIONS", "FormatRate", "Quantisation", "Target"]

_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        name: the word in plans and on the command line.
        description: what it is.
        device: what it is to software: "cuda", "rocm" (torch's device type is cuda there too),
            "xla" (TPU), "neuron" (Trainium) or "cpu".
        bandwidth: memory bandwidth, bytes/s.
        bandwidth_fraction: largest fraction of it that streaming kernels reach.
        launch_seconds: fixed cost of starting one kernel.
        formats: rate by format; a format that is not here has no hardware path.
        source: where the memory numbers come from.
        confidence: "weak" where the machine's own numbers rest on memory or one secondary page.
        gemm_formats: rates of formats that matrix units run but the planner does not choose yet.
        units: what output tiles are spread over: streaming multiprocessors, compute units, matrix
            units; None leaves tiles out of the time model.
        cache: bytes of the last-level cache.
        memory: capacity in bytes; 0 if unknown.
        compute_capability: NVIDIA's, or AMD's and others' name of the architecture.
        cast_fraction: largest fraction of the bandwidth that quantising kernels reach.
        ramp_seconds: from a kernel's start until all units are busy, and from the first idle
            unit to its end.
        issue_seconds: from the issue of one kernel of a quantisation to that of the next, which
            waits for its result: most of them are tiny, so this is what they cost. About a launch
            and a ramp in a compiled program, three times that from eager PyTorch.
        sustained_fraction: rate of long matmuls under the power limit, relative to the largest.
        quantise: passes of quantising, by scaling.
        recipes: further ways to multiply in its formats (``scaling.RECIPES``) that plans consider.
        machine: measurements on the machine at hand, None for a target known from its data only.
    """

    __pydantic_config__ = _STRICT

    name: str
    description: str
    device: Literal["cpu", "cuda", "rocm", "xla", "neuron"]
    bandwidth: float
    bandwidth_fraction: float
    launch_seconds: float
    formats: Mapping[str, FormatRate]
    source: str
    confidence: Literal["good", "weak"] = "good"
    gemm_formats: Mapping[str, FormatRate] = field(default_factory=dict)
    units: int | None = None
    cache: float = 0.0
    memory: float = 0.0
    compute_capability: str = ""
    cast_fraction: float = 0.75
    ramp_seconds: float = 1.5e-6
    issue_seconds: float = 3.5e-6
    sustained_fraction: float = 0.85
    quantise: Mapping[str, Quantisation] = field(default_factory=dict)
    recipes: tuple[str, ...] = ()
    machine: Machine | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rows = self.formats | self.gemm_formats  # type: ignore[operator]
        rates = [self.bandwidth, self.bandwidth_fraction, self.cast_fraction]
        rates += [self.sustained_fraction, 1 if self.units is None else self.units]
        rates += [number for row in rows.values() for number in (row.flops, row.block_fraction)]
        numbers_fit = all(0 < rate < inf for rate in rates)
        costs = (
            self.launch_seconds,
            self.ramp_seconds,
            self.issue_seconds,
            self.cache,
            self.memory,
        )
        numbers_fit &= all(0 <= cost < inf for cost in costs)
        numbers_fit &= all(
            min(row.accumulate_every, row.multiple_m, row.multiple_n, row.multiple_k) > 0
            for row in rows.values()
        )
        if not numbers_fit:
            raise TargetError(f"target {self.name}: rates must be positive numbers")
        _check_names(self)

    @staticmethod
    def names() -> tuple[str, ...]:
        """Every shipped target, "cpu" (this machine, measured) included."""
        folder = resources.files("precision_compiler") / "targets"
        files = (item.name for item in folder.iterdir())
        return (
            "cpu",
            *sorted(name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX)),
        )

    @staticmethod
    def load(name: str) -> "Target":
        """Return a target by name, from a TOML file's path, or "auto" for the machine at hand.

        "auto" is the GPU where there is one, else the CPU; "cpu" and "cuda" say which.

        Raises:
            TargetError: it is unknown, or the file holds a wrong key or value.
        """
        if name == "auto":
            return _this_machine("cuda" if torch.cuda.is_available() else "cpu")
        if name == "cuda" and not torch.cuda.is_available():
            raise TargetError(
                "target cuda is the GPU at hand, and torch finds none: name a shipped target such "
                "as h100 to plan for one"
            )
        if name in ("cpu", "cuda"):
            return _this_machine(name)
        with resources.as_file(resources.files("precision_compiler") / "targets") as folder:
            if name.endswith(SUFFIX):
                return _read(Path(name), folder)
            if name not in Target.names():
                raise TargetError(
                    f"unknown target {name!r}: choose auto, {', '.join(Target.names())}, or give "
                    "the path of a .toml file"
                )
            return _read(folder / f"{name}{SUFFIX}", folder)

    @property
    def architecture(self) -> str:
        """What GPU kernels are compiled for, such as "sm_90" or "gfx942"; empty for no GPU."""
        return architecture_name(self.device, self.compute_capability)

    @property
    def kernel_seconds(self) -> float:
        """Fixed cost of one kernel: its launch, and units idle at its start and end."""
        return self.launch_seconds + self.ramp_seconds

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """Formats that plans choose from, and recipes whose format the machine has."""
        known = (name for name in self.recipes if hardware_format(name) in self.formats)
        return (*self.formats, *known)

    def with_recipes(self, *names: str) -> "Target":
        """The same machine with these recipes to choose from instead of its own.

        Raises:
            TargetError: there is no such recipe, or the machine lacks the format under it.
        """
        made = replace(self, recipes=names)
        for name in names:
            if name not in made.choices:
                raise TargetError(
                    f"target {self.name}, key recipes: {name} needs the format "
                    f"{hardware_format(name)}, which it has no rate for"
                )
        return made

    def rate(self, name: str) -> FormatRate:
        """The row of a format or recipe.

        Raises:
            TargetError: the machine has no hardware path for it; the message lists those it has.
        """
        if name in RECIPES:
            return _recipe_rate(name, self.rate(hardware_format(name)))
        row = self.formats.get(name) or self.gemm_formats.get(name)
        row = row or self.formats.get(f"{name}fnuz")  # fp8 of gfx942, by OCP's name
        if row is None:
            words = [*self.formats, *self.gemm_formats]
            raise TargetError(
                f"format: {self.name} has no hardware path for {name!r}{nearest(name, words)}"
            )
        return row

    def quantisation(self, scaling: str) -> Quantisation:
        """Passes of quantising with a scaling: the target's own, or those of ``QUANTISATIONS``."""
        return self.quantise.get(scaling) or QUANTISATIONS[scaling]

    def stream_seconds(self, size: float) -> float:
        """Time to move ``size`` bytes to or from memory inside a running kernel."""
        return size / (self.bandwidth * self.bandwidth_fraction)

    def read_seconds(self, size: float) -> float:
        """Time to read a tensor of ``size`` bytes inside a running kernel."""
        machine = self.machine
        return self.stream_seconds(size) if machine is None else machine.traffic.read_seconds(size)

    def write_seconds(self, size: float) -> float:
        """Time to write a tensor of ``size`` bytes inside a running kernel."""
        machine = self.machine
        return self.stream_seconds(size) if machine is None else machine.traffic.write_seconds(size)

    def contraction_seconds(self, flops: float, size: float, name: str) -> float:
        """Roofline of one contraction: the slower of arithmetic and traffic, plus its launch.

        Args:
            flops: multiply and add operations.
            size: bytes of operands and result.
            name: format of the operands.
        """
        return self.roofline_seconds(flops, size, self.rate(name))

    def roofline_seconds(self, flops: float, size: float, rate: FormatRate) -> float:
        """As ``contraction_seconds``, with the format's row."""
        return max(flops / rate.flops, self.stream_seconds(size)) + self.launch_seconds

    def gemm_seconds(
        self,
        m: int,
        n: int,
        k: int,
        *,
        format: str,
        scaling: str = "none",
        quantise: bool = True,
        batch: int = 1,
    ) -> float:
        """Seconds of one matrix product m x k times k x n, see ``precision_compiler.gemm``.

        Args:
            m: rows of the result: tokens, in a forward product.
            n: columns of the result.
            k: length of the contraction.
            format: of both operands.
            scaling: "none", "tensor" (the largest magnitude now), "delayed", "row" or "block".
            quantise: whether both operands are bf16 and quantised first; if not, they are in the
                format already. It changes nothing for formats of 2 bytes and more.
            batch: independent products of these sizes in one kernel.

        Raises:
            TargetError: a size, the format or the scaling does not work here; says what does.
        """
        return gemm_seconds(self, Product(m, n, k, batch), format, scaling, quantise)


def _check_names(target: Target) -> None:
    """Formats are known ones, float32 among them, and so are accumulators and scalings."""
    accumulators = [row.accumulate for row in target.formats.values()]
    unknown = [name for name in (*target.formats, *accumulators) if name not in CHOICES]
    if unknown or "fp32" not in target.formats:
        words = [*CHOICES, *(name for name in GEMM_BYTES if name not in CHOICES)]
        known = f"; formats are {', '.join(words)}"
        problem = f"unknown format {unknown[0]!r}" if unknown else "no rate for fp32"
        raise TargetError(f"target {target.name}: {problem}{known}")
    for recipe in target.recipes:
        if recipe not in RECIPES:
            raise TargetError(
                f"target {target.name}, key recipes: unknown recipe {recipe!r}"
                f"{nearest(recipe, RECIPES)}"
            )
    for scaling in target.quantise:
        if scaling not in QUANTISATIONS:
            raise TargetError(
                f"target {target.name}, key quantise: unknown scaling {scaling!r}"
                f"{nearest(scaling, QUANTISATIONS)}"
            )


def _recipe_rate(name: str, row: FormatRate) -> FormatRate:
    """The row of a recipe: its format's, with the recipe's own scales."""
    scaling = SCALED_FORMATS[name].scaling
    if scaling.granularity != "block" or row.block:
        return row
    return replace(
        row,
        block=scaling.size,
        scale_bytes=SCALE_BITS[scaling.scale] / 8,
        achieved_fraction=row.achieved_fraction * row.block_fraction,
        block_fraction=1.0,
    )


def _read(path: Path, shipped: Path) -> Target:
    try:
        return _ADAPTER.validate_python(_sorted(read_table(path, shipped)))
    except ValidationError as error:
        raise TargetError(explain(error, path, _KEYS)) from error


def _sorted(table: Table) -> Table:
    """The table with formats that only the time model knows moved to ``gemm_formats``."""
    formats = table.get("formats")
    if not isinstance(formats, dict):
        return table
    apart = [name for name in formats if name in GEMM_BYTES and name not in CHOICES]
    return {
        **table,
        "formats": {name: row for name, row in formats.items() if name not in apart},
        "gemm_formats": {name: formats[name] for name in apart},
    }


def _this_machine(device: str) -> Target:
    """The CPU or GPU, measured now or read from the cache of an earlier measurement."""
    machine = measured_machine(device=device)
    source = f"measured on this machine, {machine.threads} threads"
    rates = {fmt: FormatRate(rate, 1.0, source) for fmt, rate in machine.matmul_flops.items()}
    kind: Literal["cpu", "cuda", "rocm"] = "cpu"
    capability = ""
    if device != "cpu":
        kind, capability = gpu_at_hand()
    return Target(
        name=device,
        description=machine.description,
        device=kind,
        compute_capability=capability,
        bandwidth=machine.traffic.bandwidth,
        bandwidth_fraction=1.0,
        launch_seconds=machine.launch_seconds,
        formats=rates,
        source=source,
        machine=machine,
    )


_ADAPTER: TypeAdapter[Target] = TypeAdapter(Target)
_KEYS = {
    table: tuple(row.name for row in fields(kind) if row.name not in ("machine", "gemm_formats"))
    for table, kind in (("", Target), ("formats", FormatRate), ("gemm_formats", FormatRate),
                        ("quantise", Quantisation))
}  # fmt: skip
