"""Proof without a GPU that kernels become the instructions they are meant to become.

Every kernel is compiled ahead of time for every architecture and format that ``supports`` claims,
and its machine code is read. This shows the choice of instructions, registers and shared memory,
and that nothing spills. It shows neither results nor speed: nothing of this ran on hardware. The
time is a roofline: the slower of bytes and operations at the target's largest rates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter

from precision_compiler.kernels.capability import KERNELS, supports
from precision_compiler.kernels.contract import Build, Kernel
from precision_compiler.kernels.machine_code import MachineCode, compile_for, machine_code
from precision_compiler.kernels.targets import ARCHITECTURES, Architecture
from precision_compiler.target import Target

MATRIX = r"(HMMA|QMMA|OMMA|IMMA|DMMA|HGMMA|QGMMA|IGMMA|UTC.MMA)(\..*)?|v_s?mfma_.*|v_wmma_.*"
"""Every matrix instruction: one that is not meant gives away a product in another format."""


@dataclass(frozen=True)
class Finding:
    """One kernel compiled one way for one architecture.

    Attributes:
        kernel: its name.
        build: what is particular about this way.
        architecture: compiled for.
        format: of the operands, or of what is written.
        instructions: the meant mnemonics that were found, with counts.
        registers: per thread.
        stack: bytes of local memory per thread.
        shared: bytes of shared memory of a program.
        spills: instructions that access local memory.
        compile_seconds: to compile and read it.
        failures: what is not as claimed; empty if all is.
    """

    kernel: str
    build: str
    architecture: str
    format: str
    instructions: dict[str, int]
    registers: int
    stack: int
    shared: int
    spills: int
    compile_seconds: float
    failures: tuple[str, ...]


@dataclass(frozen=True)
class Estimate:
    """The roofline of one kernel on one target.

    Attributes:
        kernel: its name.
        target: the machine.
        format: of the operands, or of what is written.
        shape: what is computed.
        flops: operations of matrix products.
        bytes: moved to and from memory.
        microseconds: the slower of the two at the target's largest rates, plus a launch.
        bound: which of the two is slower.
    """

    kernel: str
    target: str
    format: str
    shape: str
    flops: float
    bytes: float
    microseconds: float
    bound: str


def claims(
    kernels: Iterable[Kernel] = KERNELS, architectures: Iterable[Architecture] = ARCHITECTURES
) -> list[tuple[Kernel, Architecture, str]]:
    """Every kernel, architecture and format that ``supports`` claims."""
    return [
        (kernel, architecture, format)
        for kernel in kernels
        for architecture in architectures
        for format in kernel.formats
        if supports(architecture.name, kernel.name, format)
    ]


def prove(
    kernels: Iterable[Kernel] = KERNELS, architectures: Iterable[Architecture] = ARCHITECTURES
) -> Iterator[Finding]:
    """Compile every claim and read the machine code.

    Raises:
        ToolchainError: Triton is not installed.
    """
    for kernel, architecture, format in claims(kernels, architectures):
        for build in kernel.builds(format):
            yield _finding(kernel, architecture, format, build)


def _finding(kernel: Kernel, architecture: Architecture, format: str, build: Build) -> Finding:
    started = perf_counter()
    code = machine_code(compile_for(build, architecture), architecture)
    pattern = _pattern(kernel, architecture, format)
    return Finding(
        kernel=kernel.name,
        build=build.name,
        architecture=architecture.name,
        format=format,
        instructions=code.found(pattern),
        registers=code.registers,
        stack=code.stack,
        shared=code.shared,
        spills=code.spills,
        compile_seconds=perf_counter() - started,
        failures=tuple(failures(code, architecture, pattern, kernel.matrix, format)),
    )


def _pattern(kernel: Kernel, architecture: Architecture, format: str) -> str:
    if kernel.matrix:
        return architecture.matrix[format]
    return architecture.convert["e4m3" if format == "mxfp8" else format]


def failures(
    code: MachineCode, architecture: Architecture, pattern: str, matrix: bool, format: str
) -> Iterator[str]:
    """What in machine code is not as it should be, in words."""
    meant = code.found(pattern)
    if not meant:
        yield f"no instruction {pattern}"
    if matrix:
        others = code.found(MATRIX).keys() - meant.keys()
        if others:
            yield f"other matrix instructions: {', '.join(sorted(others))}"
        words = architecture.ptx.get(format)
        if words and words not in code.assembly:
            yield f"no {words} in PTX"
    if code.stack or code.spills:
        yield f"{code.stack} bytes of local memory, {code.spills} instructions that access it"
    if code.registers > architecture.registers:
        yield f"{code.registers} registers of {architecture.registers}"
    if code.shared > architecture.shared:
        yield f"{code.shared} bytes of shared memory of {architecture.shared}"


def estimates(
    kernels: Iterable[Kernel] = KERNELS, architectures: Iterable[Architecture] = ARCHITECTURES
) -> list[Estimate]:
    """The roofline of every claim."""
    machines = {row.name: Target.load(row.machine) for row in architectures}
    return [
        _estimate(kernel, machines[architecture.name], format)
        for kernel, architecture, format in claims(kernels, architectures)
    ]


def _estimate(kernel: Kernel, target: Target, format: str) -> Estimate:
    work = kernel.work(format)
    rate = target.rate(work.format)
    arithmetic, traffic = work.flops / rate.flops, target.stream_seconds(work.bytes)
    return Estimate(
        kernel=kernel.name,
        target=target.name,
        format=format,
        shape=work.shape,
        flops=work.flops,
        bytes=work.bytes,
        microseconds=1e6 * target.roofline_seconds(work.flops, work.bytes, rate),
        bound="operations" if arithmetic > traffic else "memory",
    )
