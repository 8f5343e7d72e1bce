"""Ask the hardware: matmul rates, bandwidth and the very contractions of a graph, timed here.

Times are kept on disk under the CPU's identity, the torch version and the number of threads.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch

from precision_compiler.files import write_atomically
from precision_compiler.formats import FORMATS
from precision_compiler.sizes import size_hint

CACHE = Path.home() / ".cache" / "precision_compiler"
_FORMATS = ("fp32", "bf16", "fp16")
_SIDE = 256  # of the square matmul that rates a format; slow formats stay affordable
_STREAM_BYTES = tuple(1 << power for power in range(14, 28))  # from inside to beyond every cache
_FEWEST_TURNS = 10
_MOST_TURNS = 40
_ENOUGH = 0.1  # seconds spent on one case that ran often enough
_LONGEST = 0.5  # seconds spent on one case at the most


@dataclass(frozen=True)
class Traffic:
    """Seconds that tensors of different sizes take to cross memory inside an operation.

    Small ones stay in caches; large new ones are handed over page by page by the system.

    Attributes:
        sizes: bytes, rising.
        read: seconds to read a tensor of each size.
        write: seconds to write a new one.
    """

    sizes: tuple[float, ...]
    read: tuple[float, ...]
    write: tuple[float, ...]

    def read_seconds(self, size: float) -> float:
        """Time to read a tensor of ``size`` bytes."""
        return size * float(np.interp(log2(max(size, 1.0)), *self._rates(self.read)))

    def write_seconds(self, size: float) -> float:
        """Time to write a new tensor of ``size`` bytes."""
        return size * float(np.interp(log2(max(size, 1.0)), *self._rates(self.write)))

    @property
    def bandwidth(self) -> float:
        """Bytes/s of the largest tensors, read and written."""
        return 2 * self.sizes[-1] / (self.read[-1] + self.write[-1])

    def _rates(self, seconds: Sequence[float]) -> tuple[list[float], list[float]]:
        per_byte = [time / size for time, size in zip(seconds, self.sizes, strict=True)]
        return [log2(size) for size in self.sizes], per_byte


@dataclass(frozen=True)
class Machine:
    """The CPU at hand.

    Attributes:
        description: its name.
        threads: torch threads the figures hold for.
        matmul_flops: FLOP/s of a square matmul by format.
        traffic: what reading and writing tensors costs, by size.
        launch_seconds: time of an operation on one element.
        path: file that keeps the times.
    """

    description: str
    threads: int
    matmul_flops: Mapping[str, float]
    traffic: "Traffic"
    launch_seconds: float
    path: Path
    cases: dict[str, float] = field(default_factory=dict, repr=False)

    def seconds(self, cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Time of each case, those not known yet measured alternately and kept on disk."""
        missing = {key: run for key, run in cases.items() if key not in self.cases}
        if missing:
            self.keep(alternate(missing))
        return {key: self.cases[key] for key in cases}

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Remember times, on disk too."""
        self.cases.update(seconds)
        _store(self)


def alternate(cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Fastest seconds of each case, all run in turn so that slow phases hit them alike.

    The fastest, not the median: what else runs on a machine only ever adds time, and with
    several threads adds a hundredfold.
    """
    fastest = dict.fromkeys(cases, float("inf"))
    spent = dict.fromkeys(cases, 0.0)
    for turn in range(_MOST_TURNS):
        for key, run in cases.items():
            often = turn >= _FEWEST_TURNS and spent[key] > _ENOUGH
            if often or spent[key] > _LONGEST:
                continue
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            if turn > 0 or elapsed > _LONGEST:  # the first turn makes the tensors and warms up
                fastest[key] = min(fastest[key], elapsed)
                spent[key] += elapsed
    return fastest


def measured_machine(folder: Path = CACHE) -> Machine:
    """The CPU at hand, measured once and read from disk afterwards."""
    identity = _identity()
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = folder / f"cpu-{digest}.json"
    known = _load(path, identity)
    if known is not None:
        return known
    machine = Machine(
        description=identity["cpu"],
        threads=torch.get_num_threads(),
        matmul_flops=_matmul_flops(),
        traffic=_traffic(),
        launch_seconds=alternate({"one": partial(torch.add, torch.ones(1), 1.0)})["one"],
        path=path,
    )
    _store(machine)
    return machine


def _identity() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    words = {key.strip(): value.strip() for key, value in fields.items()}
    return {
        "cpu": words.get("model name") or platform.processor() or platform.machine(),
        "flags": hashlib.sha256(words.get("flags", "").encode()).hexdigest()[:16],
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _matmul_flops() -> dict[str, float]:
    runs = {}
    for name in _FORMATS:
        square = torch.randn(_SIDE, _SIDE).to(FORMATS[name].dtype)
        runs[name] = partial(torch.mm, square, square)
    return {name: 2 * _SIDE**3 / seconds for name, seconds in alternate(runs).items()}


def _traffic() -> Traffic:
    """From sums, which read; and from negations, which read and write memory they ask for anew."""
    reads: list[float] = []
    writes: list[float] = []
    for size in _STREAM_BYTES:
        source = torch.ones(size // 4)
        found = alternate({"read": source.sum, "both": source.neg})
        reads.append(found["read"])
        writes.append(max(found["both"] - found["read"], found["both"] / 4))
    return Traffic(tuple(map(float, _STREAM_BYTES)), tuple(reads), tuple(writes))


def _store(machine: Machine) -> None:
    """Keep the times; a machine without a writable home measures again next time."""
    record = {
        "identity": _identity(),
        "matmul_flops": dict(machine.matmul_flops),
        "traffic": asdict(machine.traffic),
        "launch_seconds": machine.launch_seconds,
        "cases": machine.cases,
    }
    try:
        machine.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(machine.path, json.dumps(record, indent=1))
    except OSError:
        return


def _load(path: Path, identity: Mapping[str, str]) -> Machine | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["identity"] != dict(identity):
            return None
        return Machine(
            identity["cpu"],
            int(identity["threads"]),
            {str(key): float(value) for key, value in record["matmul_flops"].items()},
            Traffic(**{key: tuple(map(float, row)) for key, row in record["traffic"].items()}),
            float(record["launch_seconds"]),
            path,
            {str(key): float(value) for key, value in record["cases"].items()},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: measured again


def random_like(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with the sizes and strides of a fake one and random contents."""
    sizes, strides = list(map(size_hint, value.shape)), list(map(size_hint, value.stride()))
    made = torch.empty_strided(sizes, strides, dtype=dtype)
    return made.normal_() if dtype.is_floating_point else made.zero_()


def layout_key(values: Sequence[Any]) -> str:
    """Text that tells apart calls whose time may differ: sizes, strides, dtypes, scalars."""
    words = []
    for value in values:
        if isinstance(value, torch.Tensor):
            words.append(f"{value.dtype}{tuple(value.shape)}{tuple(value.stride())}")
        else:
            words.append(repr(value))
    return " ".join(words)
