"""Matrix products on float32's tensor-core mode, one at a time.

Torch has the mode as a setting of the process; here it is a property of an operation, so that a
graph can have products in tf32 beside products in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@torch.library.custom_op("precision_compiler::tf32_matmul", mutates_args=())
def tf32_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` of matrices or batches of them, operands rounded to tf32 by the tensor cores.

    On a device without the mode it is the product in float32.
    """
    with _tensor_cores():
        return a @ b


@tf32_matmul.register_fake
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a @ b


@contextmanager
def _tensor_cores() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


TF32_MATMUL = torch.ops.precision_compiler.tf32_matmul.default
