"""Proof, without a GPU, that the kernels use the tensor cores they are meant for.

Compiles every kernel for every architecture that is claimed, reads the machine code and prints
what was found; exits with 1 if anything is not as claimed. Takes a few minutes.
Run: python benchmarks/kernels.py -o kernels.json --page docs/kernels.md
"""

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import perf_counter

from precision_compiler.kernels.language import triton
from precision_compiler.kernels.pages import updated
from precision_compiler.kernels.proof import Finding, estimates, prove


def record(findings: Iterable[Finding], seconds: float) -> dict[str, object]:
    """What the JSON file holds."""
    return {
        "triton": triton.__version__,
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
        "estimates": [asdict(estimate) for estimate in estimates()],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--page", type=Path, help="page whose tables are brought up to date")
    options = parser.parse_args()
    started = perf_counter()
    findings = []
    for finding in prove():
        words = "; ".join(finding.failures) or "as claimed"
        place = f"{finding.architecture} {finding.kernel} {finding.format} {finding.build}"
        print(
            f"{place}: {finding.instructions}, {finding.registers} registers: {words}", flush=True
        )
        findings.append(finding)
    seconds = perf_counter() - started
    print(f"{len(findings)} builds in {seconds:.0f} s")
    if options.output:
        options.output.write_text(json.dumps(record(findings, seconds), indent=1) + "\n")
    if options.page:
        options.page.write_text(updated(options.page.read_text(), findings))
    return int(any(finding.failures for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
