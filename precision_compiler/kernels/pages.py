"""The tables of docs/kernels.md."""

import re
from collections.abc import Iterable, Sequence

from precision_compiler.kernels.capability import KERNELS, supports
from precision_compiler.kernels.proof import Finding, estimates
from precision_compiler.kernels.targets import ARCHITECTURES


def updated(page: str, findings: Iterable[Finding]) -> str:
    """The page with its tables made again from findings of a whole proof."""
    made = {
        "support": support_table(),
        "proof": proof_table(findings),
        "roofline": roofline_table(),
    }
    for name, table in made.items():
        mark = f"<!-- {name} table -->\n"
        before, _, after = page.partition(mark)
        page = before + mark + table + re.sub(r"\A(?:\|.*\n)*", "", after)
    return page


def support_table() -> str:
    """Architectures by kernel and format: yes, or why not."""
    head = ("kernel", "format", *(row.name for row in ARCHITECTURES))
    rows = [
        (
            kernel.name,
            format,
            *("yes" if supports(row.name, kernel.name, format) else "-" for row in ARCHITECTURES),
        )
        for kernel in KERNELS
        for format in kernel.formats
    ]
    return _table(head, rows)


def proof_table(findings: Iterable[Finding]) -> str:
    """What the machine code of each build holds."""
    head = (
        "kernel", "format", "architecture", "build", "instruction (count)", "registers",
        "shared, KiB", "spills", "result",
    )  # fmt: skip
    rows = [
        (
            found.kernel,
            found.format,
            found.architecture,
            found.build,
            ", ".join(f"{name} ({count})" for name, count in found.instructions.items()),
            str(found.registers),
            f"{found.shared / 1024:.1f}",
            str(found.spills),
            "; ".join(found.failures) or "as claimed",
        )
        for found in findings
    ]
    return _table(head, rows)


def roofline_table() -> str:
    """The roofline of each kernel."""
    head = ("kernel", "format", "target", "shape", "GFLOP", "MB", "microseconds", "bound by")
    rows = [
        (
            row.kernel,
            row.format,
            row.target,
            row.shape,
            f"{row.flops / 1e9:.0f}",
            f"{row.bytes / 1e6:.0f}",
            f"{row.microseconds:.0f}",
            row.bound,
        )
        for row in estimates()
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
