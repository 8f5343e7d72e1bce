"""Ask the hardware: matmul rates, bandwidth and the very contractions of a graph, timed here.

The same for a CPU and a GPU. Times are kept on disk under the hardware's identity, the torch
version and the number of threads.
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import ceil, log2
from pathlib import Path
from typing import Any

import numpy as np
import torch

from precision_compiler.files import write_atomically
from precision_compiler.formats import FORMATS
from precision_compiler.scaled_calls import SCALED_PRODUCTS, scaled_call
from precision_compiler.sizes import size_hint
from precision_compiler.tf32 import tf32_matmul

CACHE = Path.home() / ".cache" / "precision_compiler"
_FORMATS = ("fp32", "bf16", "fp16")
_SIDE = {"cpu": 256, "cuda": 4096}  # of the square matmul that rates a format, slow ones too
_STREAM_BYTES = tuple(1 << power for power in range(14, 28))  # from inside to beyond every cache
_GPU_STREAM_BYTES = tuple(1 << power for power in range(16, 31))
_GPU_TIMED = 1e-3  # seconds that calls are repeated for between two waits for a GPU
_BUSY = 20.0  # times slower than now: no phase of a machine that has its cores for itself
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
    """The CPU or GPU at hand.

    Attributes:
        description: its name.
        threads: torch threads the figures hold for.
        matmul_flops: FLOP/s of a square matmul by format.
        traffic: what reading and writing tensors costs, by size.
        launch_seconds: time of an operation on one element.
        path: file that keeps the times.
        cases: the times.
        device: torch's type of it, "cpu" or "cuda" (AMD's too).
    """

    description: str
    threads: int
    matmul_flops: Mapping[str, float]
    traffic: "Traffic"
    launch_seconds: float
    path: Path
    cases: dict[str, float] = field(default_factory=dict, repr=False)
    device: str = "cpu"

    def seconds(self, cases: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
        """Time of each case, those not known yet measured alternately and kept on disk."""
        missing = {key: run for key, run in cases.items() if key not in self.cases}
        if missing:
            self.keep(alternate(missing, self.device))
        return {key: self.cases[key] for key in cases}

    def keep(self, seconds: Mapping[str, float]) -> None:
        """Remember times, on disk too."""
        self.cases.update(seconds)
        _store(self)


def alternate(cases: Mapping[str, Callable[[], Any]], device: str = "cpu") -> dict[str, float]:
    """Fastest seconds of each case, all run in turn so that slow phases hit them alike.

    The fastest, not the median: what else runs on a machine only ever adds time, and with
    several threads adds a hundredfold. On a GPU short cases are repeated between two waits, so
    that what is timed is the kernel and not its launch from Python.
    """
    fastest = dict.fromkeys(cases, float("inf"))
    spent = dict.fromkeys(cases, 0.0)
    repeats = dict.fromkeys(cases, 1)
    for turn in range(_MOST_TURNS):
        for key, run in cases.items():
            often = turn >= _FEWEST_TURNS and spent[key] > _ENOUGH
            if often or spent[key] > _LONGEST:
                continue
            elapsed = timed(run, repeats[key], device)
            if device != "cpu" and turn > 0:
                repeats[key] = min(100, ceil(_GPU_TIMED / elapsed))
            if turn > 0 or elapsed > _LONGEST:  # the first turn makes the tensors and warms up
                fastest[key] = min(fastest[key], elapsed)
                spent[key] += elapsed
    return fastest


def timed(run: Callable[[], Any], repeats: int = 1, device: str = "cpu") -> float:
    """Seconds of one call, of ``repeats`` in a row; waits for a GPU before and after."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    wait_for(device)
    return (time.perf_counter() - start) / repeats


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was asked to; a CPU always has."""
    if device != "cpu":
        torch.cuda.synchronize()


def measured_machine(folder: Path = CACHE, device: str = "cpu") -> Machine:
    """The CPU or the GPU at hand, measured once and read from disk afterwards.

    Measured again where the times on disk come from a machine that was busy with something else.
    """
    identity = _identity(device)
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = folder / f"{device}-{digest}.json"
    known = _load(path, identity, device)
    if known is not None and not _was_busy(known):
        return known
    single = torch.ones(1, device=device)
    machine = Machine(
        description=identity["cpu"],
        threads=torch.get_num_threads(),
        matmul_flops=matmul_flops(device, _SIDE[device]),
        traffic=_traffic(device),
        launch_seconds=alternate({"one": partial(torch.add, single, 1.0)}, device)["one"],
        path=path,
        device=device,
    )
    _store(machine)
    return machine


def _was_busy(machine: Machine) -> bool:
    """Whether times were measured while other programs kept all cores from working together.

    Threads that wait for each other then take milliseconds where they take microseconds, and plans
    would be made for that. What is 20 times faster now was not the machine's own time.
    """
    place = len(machine.traffic.sizes) // 3  # in the caches, and large enough for several threads
    source = torch.ones(int(machine.traffic.sizes[place]) // 4, device=machine.device)
    now = alternate({"read": source.sum}, machine.device)["read"]
    return machine.traffic.read[place] > _BUSY * now


def _identity(device: str) -> dict[str, str]:
    if device != "cpu":
        found = torch.cuda.get_device_properties(0)
        return {
            "cpu": found.name,
            "flags": f"{found.multi_processor_count} units, {found.total_memory} bytes",
            "capability": str(getattr(found, "gcnArchName", (found.major, found.minor))),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
        }
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


def matmul_flops(device: str, side: int) -> dict[str, float]:
    """FLOP/s of a square matmul by format; on a GPU also in those that only it may have.

    A format that torch refuses to multiply here is left out.
    """
    runs: dict[str, Callable[[], Any]] = {}
    for name in _FORMATS:
        square = torch.randn(side, side, device=device).to(FORMATS[name].dtype)
        runs[name] = partial(torch.mm, square, square)
    if device != "cpu":
        square = torch.randn(side, side, device=device)
        runs["tf32"] = partial(tf32_matmul, square, square)
        runs |= {name: scaled_call(side, side, side, name, device) for name in SCALED_PRODUCTS}
    known = {name: run for name, run in runs.items() if _works(run, device)}
    return {name: 2 * side**3 / seconds for name, seconds in alternate(known, device).items()}


def _works(run: Callable[[], Any], device: str) -> bool:
    """Whether torch carries out a call here: it says so only when asked to."""
    try:
        timed(run, 1, device)
    except (RuntimeError, ValueError):  # NotImplementedError is one of the former
        return False
    return True


def _traffic(device: str) -> Traffic:
    """From sums, which read; and from negations, which read and write memory they ask for anew."""
    reads: list[float] = []
    writes: list[float] = []
    sizes = _STREAM_BYTES if device == "cpu" else _GPU_STREAM_BYTES
    for size in sizes:
        source = torch.ones(size // 4, device=device)
        found = alternate({"read": source.sum, "both": source.neg}, device)
        reads.append(found["read"])
        writes.append(max(found["both"] - found["read"], found["both"] / 4))
    return Traffic(tuple(map(float, sizes)), tuple(reads), tuple(writes))


def _store(machine: Machine) -> None:
    """Keep the times; a machine without a writable home measures again next time."""
    record = {
        "identity": _identity(machine.device),
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


def _load(path: Path, identity: Mapping[str, str], device: str) -> Machine | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["identity"] != dict(identity) or not record["traffic"]["sizes"]:
            return None
        return Machine(
            identity["cpu"],
            int(identity["threads"]),
            {str(key): float(value) for key, value in record["matmul_flops"].items()},
            Traffic(**{key: tuple(map(float, row)) for key, row in record["traffic"].items()}),
            float(record["launch_seconds"]),
            path,
            {str(key): float(value) for key, value in record["cases"].items()},
            device,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # absent or damaged: measured again


def random_like(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor with the sizes, strides and device (the CPU for meta) of a fake one, random."""
    sizes, strides = list(map(size_hint, value.shape)), list(map(size_hint, value.stride()))
    device = "cpu" if value.device.type == "meta" else value.device
    made = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
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
