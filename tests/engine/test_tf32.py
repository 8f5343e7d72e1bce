"""Products in tf32 leave float32's setting as they found it."""

import torch

from precision_compiler.tf32 import TF32_MATMUL, tf32_matmul


def test_the_setting_holds_for_the_product_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    x = torch.randn(3, 4, 5)
    assert torch.equal(tf32_matmul(x, x.transpose(1, 2)), x @ x.transpose(1, 2))
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_it_is_restored_after_a_failure() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        tf32_matmul(torch.ones(2, 3), torch.ones(2, 3))
    except RuntimeError:
        assert torch.backends.cuda.matmul.fp32_precision == before
    else:
        raise AssertionError("sizes that do not fit were multiplied")


def test_the_operator_is_a_proper_one() -> None:
    x = torch.randn(4, 4)
    torch.library.opcheck(TF32_MATMUL, (x, x), test_utils=("test_schema", "test_faketensor"))
