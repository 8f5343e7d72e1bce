"""Machines as data: rates per format, memory, launch cost; one TOML file each."""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from math import inf
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from precision_compiler.errors import TargetError
from precision_compiler.formats import FORMATS
from precision_compiler.measure import Machine, measured_machine

_SUFFIX = ".toml"
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class FormatRate:
    """How fast contractions run with operands in one format.

    Attributes:
        peak_flops: dense peak in FLOP/s, float32 accumulation.
        achieved_fraction: largest fraction of the peak that large matmuls reach.
        confidence: "good", or "weak" where the number rests on memory or one secondary page.
        source: where the numbers come from.
        accumulate: format of the running sum of products.
        accumulate_every: products added exactly before the sum is rounded to it.
    """

    __pydantic_config__ = _STRICT

    peak_flops: float
    achieved_fraction: float
    source: str
    confidence: Literal["good", "weak"] = "good"
    accumulate: str = "fp32"
    accumulate_every: int = 1

    @property
    def flops(self) -> float:
        """Rate that large matmuls reach, FLOP/s."""
        return self.peak_flops * self.achieved_fraction


@dataclass(frozen=True)
class Target:
    """One machine.

    Attributes:
        name: the word in plans and on the command line.
        description: what it is.
        device: torch device type it belongs to.
        bandwidth: memory bandwidth, bytes/s.
        bandwidth_fraction: largest fraction of it that streaming kernels reach.
        launch_seconds: fixed cost of starting one kernel.
        formats: rate by format; a format that is not here has no hardware path.
        source: where the memory numbers come from.
        machine: measurements on the machine at hand, None for a target known from its data only.
    """

    __pydantic_config__ = _STRICT

    name: str
    description: str
    device: Literal["cpu", "cuda"]
    bandwidth: float
    bandwidth_fraction: float
    launch_seconds: float
    formats: Mapping[str, FormatRate]
    source: str
    machine: Machine | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        rates = [self.bandwidth, self.bandwidth_fraction]
        rates += [rate.flops for rate in self.formats.values()]
        numbers_fit = all(0 < rate < inf for rate in rates) and 0 <= self.launch_seconds < inf
        numbers_fit &= all(rate.accumulate_every > 0 for rate in self.formats.values())
        if not numbers_fit:
            raise TargetError(f"target {self.name}: rates must be positive numbers")
        named = [*self.formats, *(rate.accumulate for rate in self.formats.values())]
        unknown = [name for name in named if name not in FORMATS]
        if unknown or "fp32" not in self.formats:
            problem = f"unknown format {unknown[0]!r}" if unknown else "no rate for fp32"
            raise TargetError(f"target {self.name}: {problem}; formats are {', '.join(FORMATS)}")

    @staticmethod
    def names() -> tuple[str, ...]:
        """Every shipped target, "cpu" (this machine, measured) included."""
        folder = resources.files("precision_compiler") / "targets"
        files = (item.name for item in folder.iterdir())
        return (
            "cpu",
            *sorted(name.removesuffix(_SUFFIX) for name in files if name.endswith(_SUFFIX)),
        )

    @staticmethod
    def load(name: str) -> "Target":
        """Return a target by name, from a TOML file's path, or "auto" for the machine at hand.

        Raises:
            TargetError: it is unknown, or the file holds a wrong key or value.
        """
        if name in ("auto", "cpu"):
            return _this_machine(name)
        if name.endswith(_SUFFIX):
            return _read(Path(name))
        if name not in Target.names():
            raise TargetError(
                f"unknown target {name!r}: choose auto, {', '.join(Target.names())}, or give the "
                "path of a .toml file"
            )
        with resources.as_file(resources.files("precision_compiler") / "targets") as folder:
            return _read(folder / f"{name}{_SUFFIX}")

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
        arithmetic = flops / self.formats[name].flops
        return max(arithmetic, self.stream_seconds(size)) + self.launch_seconds


def _read(path: Path) -> Target:
    try:
        return _ADAPTER.validate_python(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TargetError(
            f"cannot read the target {path}: {os.strerror(error.errno or 0)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"target {path} is not valid TOML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise TargetError(f"target {path}, key {where}: {first['msg']}") from error


def _this_machine(name: str) -> Target:
    """The CPU, measured now or read from the cache of an earlier measurement."""
    machine = measured_machine()
    source = f"measured on this machine, {machine.threads} threads"
    rates = {fmt: FormatRate(rate, 1.0, source) for fmt, rate in machine.matmul_flops.items()}
    return Target(
        name="cpu",
        description=machine.description,
        device="cpu",
        bandwidth=machine.traffic.bandwidth,
        bandwidth_fraction=1.0,
        launch_seconds=machine.launch_seconds,
        formats=rates,
        source=source,
        machine=machine,
    )


_ADAPTER: TypeAdapter[Target] = TypeAdapter(Target)
