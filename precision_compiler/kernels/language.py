"""Triton where it is installed, and what stands in for it where it is not.

Triton is an optional extra. Without it kernels are plain functions that nobody calls: everything
imports, the operators run their references, and only asking for a GPU kernel is refused.
"""

import importlib.util
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from precision_compiler.errors import ToolchainError

INSTALLED = importlib.util.find_spec("triton") is not None
INSTALL = "install it with `pip install 'precision_compiler[triton]'`"

triton: Any
tl: Any
if TYPE_CHECKING:
    constexpr = Any
    """Annotation of a kernel's argument that is fixed when the kernel is compiled."""
    Value = Any
    """Annotation of every other argument: pointers, numbers and blocks of numbers."""
if INSTALLED:
    import triton  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]
    import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore, no-redef]

    if not TYPE_CHECKING:
        constexpr, Value = tl.constexpr, tl.tensor
else:
    triton = None
    tl = SimpleNamespace()
    if not TYPE_CHECKING:

        class constexpr:
            """Stands in for Triton's annotation."""

        Value = object


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit``; without Triton the function as it is."""
    return triton.jit(function) if INSTALLED else function


def require_triton() -> None:
    """Checks that GPU kernels can be compiled here.

    Raises:
        ToolchainError: Triton is not installed.
    """
    if not INSTALLED:
        raise ToolchainError(f"GPU kernels need Triton, which is not installed: {INSTALL}")
