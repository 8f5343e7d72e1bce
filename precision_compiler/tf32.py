"""Matrix products on float32's tensor-core mode, one at a time.

Torch has the mode as a setting of the process; here it is a property of an operation, so that a
graph can have products in tf32 beside products in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@torch.library.custom_op("precision_compiler::tf32_matmul", mutates_args=())
def tf32_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of matrices or batches of them, operands rounded to tf32 by the tensor cores.

    On a device without the mode it is the product in float32.
    """
    with float32_products(torch.backends.cuda.matmul, "tf32"):
        return a @ b


@tf32_matmul.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@contextmanager
def float32_products(backend: Any, precision: str) -> Iterator[None]:
    """Let a backend round operands of float32 products inside, and set it back after.

    Args:
        backend: ``torch.backends.cuda.matmul`` or ``torch.backends.mkldnn.matmul``.
        precision: a format that the backend may round to where the hardware has it.
    """
    before = backend.fp32_precision
    backend.fp32_precision = precision
    try:
        yield
    finally:
        backend.fp32_precision = before


TF32_MATMUL = torch.ops.precision_compiler.tf32_matmul.default
