"""Derivatives that are next to nothing are followed no further."""

import pytest
import torch

from precision_compiler.adjoints import gated


def test_the_maximum_that_softmax_subtracts_is_not_differentiated() -> None:
    x = torch.randn(64, 500).requires_grad_()
    largest, arrived = x.amax(-1, keepdim=True), list[torch.Tensor]()
    largest.register_hook(arrived.append)  # type: ignore[no-untyped-call]
    shifted = x - gated(largest, lambda: 1e-5)
    weights = torch.randn(64, 500) / 32000**0.5
    result = ((shifted - shifted.exp().sum(-1, keepdim=True).log()) * weights).sum()
    (found,) = torch.autograd.grad(result, x)
    (expected,) = torch.autograd.grad((x.log_softmax(-1) * weights).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert arrived in ([], [None])  # None is what autograd has for a zero that it knows of


@pytest.mark.parametrize(("least", "passes"), [(1e-6, True), (10.0, False)])
def test_what_counts_passes(least: float, passes: bool) -> None:
    """By what errors of 100 % do to the objective: here by twice the largest number, 6."""
    x = torch.tensor([1.0, 3.0]).requires_grad_()
    (found,) = torch.autograd.grad(
        2 * gated(x.amax(), lambda: least), x, allow_unused=True, materialize_grads=True
    )
    assert found.tolist() == [0.0, 2.0 if passes else 0.0]
