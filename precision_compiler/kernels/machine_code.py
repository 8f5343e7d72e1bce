"""Compiles kernels ahead of time, without a GPU, and reads the machine code that comes out."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from precision_compiler.errors import InternalError
from precision_compiler.kernels.contract import Build
from precision_compiler.kernels.language import require_triton, triton
from precision_compiler.kernels.targets import Architecture

_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", re.MULTILINE)
_GCN = re.compile(r"^\s+((?:v|s|ds|global|buffer|scratch|flat)_\w+)(.*)$", re.MULTILINE)
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_SPILLS = ("STL", "LDL", "scratch_store", "scratch_load")


@dataclass(frozen=True)
class MachineCode:
    """What a compiled kernel consists of.

    Attributes:
        instructions: how often each mnemonic occurs, modifiers included.
        registers: per thread; on AMD vector and accumulation registers together.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory of a program.
        spills: instructions that store to or load from local memory.
        assembly: what the machine code was made from: PTX, or AMD's assembly.
    """

    instructions: Counter[str]
    registers: int
    stack: int
    shared: int
    spills: int
    assembly: str

    def found(self, pattern: str) -> dict[str, int]:
        """The mnemonics that match a pattern, with their counts."""
        return {
            name: count
            for name, count in sorted(self.instructions.items())
            if re.fullmatch(pattern, name)
        }


def compile_for(build: Build, architecture: Architecture) -> Any:
    """Compile one build for an architecture; no driver and no GPU take part.

    Pointers and sizes are taken to be multiples of 16, as those that the operators pass are.
    """
    require_triton()
    from triton.backends.compiler import GPUTarget  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from triton.compiler import ASTSource  # type: ignore[import-not-found, import-untyped, unused-ignore]

    names = [parameter.name for parameter in build.function.params]
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in build.signature.items()
        if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(build.function, signature, dict(build.constants), aligned)
    target = GPUTarget(architecture.backend, architecture.code, architecture.warp)
    options = {"num_warps": build.warps, "num_stages": build.stages}
    return triton.compile(source, target=target, options=options)


def machine_code(compiled: Any, architecture: Architecture) -> MachineCode:
    """Read the machine code of a compiled kernel."""
    if architecture.backend == "hip":
        return _read_gcn(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _read_sass(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _read_sass(cubin: bytes, ptx: str, shared: int) -> MachineCode:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = _cuobjdump(path)
    usage = _USAGE.search(text)
    if usage is None:
        raise InternalError("cuobjdump reports no use of registers")
    found = Counter(match.group(1) for match in _SASS.finditer(text))
    registers, stack, fixed = (int(number) for number in usage.groups())
    return MachineCode(found, registers, stack, max(shared, fixed), _spills(found), ptx)


def _read_gcn(text: str, shared: int) -> MachineCode:
    found = Counter(match.group(1) for match in _GCN.finditer(text))
    registers = _metadata(text, "vgpr_count")
    stack = _metadata(text, "private_segment_fixed_size")
    spilled = _metadata(text, "vgpr_spill_count") + _metadata(text, "sgpr_spill_count")
    return MachineCode(found, registers, stack, shared, spilled + _spills(found), text)


def _spills(found: Counter[str]) -> int:
    return sum(
        count
        for name, count in found.items()
        if name.split(".")[0] in _SPILLS or name.startswith(("scratch_store", "scratch_load"))
    )


def _metadata(text: str, key: str) -> int:
    match = re.search(rf"\.{key}:\s+(\d+)", text)
    if match is None:
        raise InternalError(f"AMD's assembly has no {key}")
    return int(match.group(1))


def _cuobjdump(path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "-res-usage", "-sass", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
