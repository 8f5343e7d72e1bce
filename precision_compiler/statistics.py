"""What calibration keeps of a tensor: enough to price any format without running it again."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor, log2

import numpy as np
import torch

from precision_compiler.formats import Format, rounding_variance

_EXPONENTS = np.arange(-126, 129)  # of the float32 exponent field 1 to 255


@dataclass(frozen=True)
class Sensitivity:
    """Binade histogram of one tensor, weighted by what its errors do to the gradient.

    Attributes:
        weight: per binade, the sum of ``h^2`` over the elements in it, where ``h`` is the
            derivative of the probed gradient with respect to the element. Zeros are in no
            binade: no format rounds them.
        amax: largest magnitude.
    """

    weight: np.ndarray
    amax: float

    def variance(self, fmt: Format, drift: int = 0) -> float:
        """Variance of the probed gradient when the tensor is rounded to ``fmt``.

        ``sum h^2 d^2`` with the mean squared rounding error ``d^2`` of each binade; errors of
        different elements are taken as independent. With ``drift`` the relative errors are those
        of values ``2**drift`` times as large.
        """
        errors = rounding_variance(_EXPONENTS, fmt, self.scale_exponent(fmt) + drift)
        return float(np.dot(self.weight, errors))

    def scale_exponent(self, fmt: Format) -> int:
        """Power of two that a scaled format multiplies the tensor by to fill its range."""
        if not fmt.scaled or self.amax == 0.0:
            return 0
        return floor(log2(fmt.max_finite) - log2(self.amax))


def insensitive(values: torch.Tensor) -> Sensitivity:
    """The record of a float32 tensor that no gradient depends on."""
    flat = values.detach().reshape(-1)
    amax = float(torch.maximum(flat.amax(), -flat.amin())) if flat.numel() else 0.0
    return Sensitivity(np.zeros(len(_EXPONENTS)), amax)


def weight_of(values: torch.Tensor, adjoint: torch.Tensor) -> np.ndarray:
    """Sum of the squared derivative per binade of a float32 tensor.

    Args:
        values: the tensor; its subnormal numbers count as zeros.
        adjoint: the derivative ``h`` with respect to each element, same shape.
    """
    flat = values.detach().reshape(-1)
    field = flat.view(torch.int32).bitwise_right_shift(23).bitwise_and_(0xFF)
    squares = adjoint.detach().reshape(-1).double().square_()
    return torch.bincount(field, squares, minlength=256).numpy()[1:]


def sensitivity_of(values: torch.Tensor, adjoint: torch.Tensor) -> Sensitivity:
    """The record of a float32 tensor with the given derivative."""
    return Sensitivity(weight_of(values, adjoint), insensitive(values).amax)


@dataclass(frozen=True)
class Statistics:
    """Everything one calibration run leaves behind.

    Attributes:
        stores: per storage site, for the total effect of the stored tensor.
        operands: per (contraction site, argument position), for that reading alone.
        internals: per contraction site, for intermediate results inside the operation (the
            probabilities of attention), which are rounded to its format as well.
        gradient_norm: Euclidean norm of all parameter gradients together.
        loss: value of the loss.
    """

    stores: Mapping[str, Sensitivity]
    operands: Mapping[tuple[str, int], Sensitivity]
    internals: Mapping[str, tuple[Sensitivity, ...]]
    gradient_norm: float
    loss: float
