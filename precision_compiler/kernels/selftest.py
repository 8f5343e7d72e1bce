"""Runs every kernel on this machine against its reference, and times it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch
from torch._library.custom_ops import CustomOpDef

from precision_compiler.errors import ToolchainError
from precision_compiler.gpu import this_architecture
from precision_compiler.kernels.capability import KERNELS, supports
from precision_compiler.kernels.compare import NARROW, mismatches
from precision_compiler.kernels.contract import Kernel
from precision_compiler.kernels.language import require_triton

REPEATS = 20
CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@dataclass(frozen=True)
class Check:
    """One kernel in one format.

    Attributes:
        kernel: its name.
        format: of the operands, or of what is written.
        milliseconds: of one run on a typical shape (a tiny one on the CPU); None if it did not run.
        problems: what is wrong, in words.
        skipped: why it did not run.
    """

    kernel: str
    format: str
    milliseconds: float | None = None
    problems: tuple[str, ...] = ()
    skipped: str = ""


def selftest(device: Literal["cpu", "cuda"]) -> Iterator[Check]:
    """Check every kernel in every format, one result at a time.

    On a GPU the Triton kernels run against their references, on small and ragged shapes; on the
    CPU the operators, which are the references there, pass torch's own checks of operators.

    Raises:
        ToolchainError: there is no GPU, or no Triton.
    """
    if device == "cpu":
        return _on_cpu()
    if not torch.cuda.is_available():
        raise ToolchainError(
            "selftest: torch finds no GPU on this machine, so no kernel can run; "
            "`--device cpu` checks the references"
        )
    require_triton()
    return _on_gpu(this_architecture())


def _on_cpu() -> Iterator[Check]:
    for kernel in KERNELS:
        for format in kernel.formats:
            problems = []
            for given in kernel.cases(format, "cpu"):
                check_operator(kernel.op, given)
                problems += differences(kernel, given, 0.0)
            seconds = _seconds(lambda: kernel.op(*given), lambda: None)  # noqa: B023
            yield Check(kernel.name, format, 1e3 * seconds, tuple(problems))


def check_operator(op: CustomOpDef, given: tuple[Any, ...]) -> None:
    """``torch.library.opcheck``, which cannot compare fp8 operands and takes NaN for a difference.

    Of operands in fp8 it does not check the schema, and those with a NaN it does not get.
    """
    tensors = [x for x in given if isinstance(x, torch.Tensor)]
    if any(bool(x.float().isnan().any()) for x in tensors):
        return
    narrow = any(x.dtype in NARROW for x in tensors)
    torch.library.opcheck(op, given, test_utils=CHECKS if narrow else ("test_schema", *CHECKS))


def _on_gpu(architecture: str) -> Iterator[Check]:
    for kernel in KERNELS:
        for format in kernel.formats:
            support = supports(architecture, kernel.name, format)
            if support:
                yield _gpu_check(kernel, format)
            else:
                yield Check(kernel.name, format, skipped=support.reason)


def _gpu_check(kernel: Kernel, format: str) -> Check:
    problems = [
        words
        for given in kernel.cases(format, "cuda")
        for words in differences(kernel, given, kernel.tolerance)
    ]
    large = kernel.example(format, "cuda", True)
    seconds = _seconds(lambda: kernel.op(*large), torch.cuda.synchronize)
    return Check(kernel.name, format, 1e3 * seconds, tuple(problems))


def differences(kernel: Kernel, given: tuple[Any, ...], tolerance: float) -> list[str]:
    """What the operator makes of arguments that its reference does not."""
    made, wanted = _tensors(kernel.op(*given)), _tensors(kernel.reference(*given))
    return mismatches(made, wanted, tolerance)


def _tensors(made: Any) -> tuple[torch.Tensor, ...]:
    return (made,) if isinstance(made, torch.Tensor) else tuple(made)


def _seconds(run: Callable[[], Any], wait: Callable[[], None]) -> float:
    """Mean of a few runs after one to warm up."""
    run()
    wait()
    started = perf_counter()
    for _ in range(REPEATS):
        run()
    wait()
    return (perf_counter() - started) / REPEATS
