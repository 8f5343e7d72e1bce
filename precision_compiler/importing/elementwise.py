"""ONNX operators on single elements: arithmetic, comparison, activation, change of type."""

import functools
import operator
from typing import Any

import onnx_ir as ir
import torch

from precision_compiler.importing.operator import Operator, Table, require
from precision_compiler.importing.tensors import torch_dtype


def _divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _modulo(a: torch.Tensor, b: torch.Tensor, *, fmod: int = 0) -> torch.Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def _power(x: torch.Tensor, exponent: Any) -> torch.Tensor:
    return torch.pow(x, exponent).to(x.dtype)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(condition, a, b)


def _fold(function: Any) -> Operator:
    def run(*values: torch.Tensor) -> torch.Tensor:
        return functools.reduce(function, values)

    return Operator(run)


def _mean(*values: torch.Tensor) -> torch.Tensor:
    return functools.reduce(operator.add, values) / len(values)


def _clip(x: torch.Tensor, min: Any = None, max: Any = None) -> torch.Tensor:
    return x if min is None and max is None else torch.clamp(x, min, max)


def _cast(x: torch.Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> torch.Tensor:
    wanted = torch_dtype(ir.DataType(to))
    require(wanted.itemsize > 1 or not wanted.is_floating_point, "casts to fp8 are not supported")
    if x.is_floating_point() and not wanted.is_floating_point and wanted != torch.bool:
        return x.trunc().to(wanted)
    return x.to(wanted)


def _cast_like(x: torch.Tensor, like: torch.Tensor, *, saturate: int = 1) -> torch.Tensor:
    return x.to(like.dtype)


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def _leaky_relu(x: torch.Tensor, *, alpha: float = 0.01) -> torch.Tensor:
    return torch.nn.functional.leaky_relu(x, alpha)


def _prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    return torch.where(x < 0, slope * x, x)


def _elu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return torch.nn.functional.elu(x, alpha)


def _swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(x if alpha == 1.0 else alpha * x)


def _hard_sigmoid(x: torch.Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _dropout(
    x: torch.Tensor, ratio: Any = None, training_mode: Any = False, *, seed: int = 0
) -> torch.Tensor:
    require(not training_mode, "it drops values in training mode: export for inference")
    return x


def _is_inf(x: torch.Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> torch.Tensor:
    found = [torch.isposinf(x)] * bool(detect_positive) + [torch.isneginf(x)] * bool(
        detect_negative
    )
    return functools.reduce(torch.logical_or, found)


_UNARY: dict[str, Any] = {
    "Neg": torch.neg, "Abs": torch.abs, "Exp": torch.exp, "Log": torch.log, "Sqrt": torch.sqrt,
    "Reciprocal": torch.reciprocal, "Erf": torch.erf, "Tanh": torch.tanh, "Sin": torch.sin,
    "Cos": torch.cos, "Tan": torch.tan, "Atan": torch.atan, "Sinh": torch.sinh,
    "Cosh": torch.cosh, "Sigmoid": torch.sigmoid, "Relu": torch.relu, "Floor": torch.floor,
    "Ceil": torch.ceil, "Round": torch.round, "Sign": torch.sign, "Not": torch.logical_not,
    "IsNaN": torch.isnan, "BitwiseNot": torch.bitwise_not,
    "Softplus": torch.nn.functional.softplus, "Softsign": torch.nn.functional.softsign,
    "Mish": torch.nn.functional.mish, "HardSwish": torch.nn.functional.hardswish,
}  # fmt: skip

_BINARY: dict[str, Any] = {
    "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": _divide, "Equal": torch.eq,
    "Less": torch.lt, "LessOrEqual": torch.le, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "Mod": _modulo,
    "PRelu": _prelu, "Where": _where, "CastLike": _cast_like,
}  # fmt: skip

ELEMENTWISE: Table = {
    **{name: Operator(function) for name, function in (_UNARY | _BINARY).items()},
    "Pow": Operator(_power, numbers=(1,)),
    "Min": _fold(torch.minimum),
    "Max": _fold(torch.maximum),
    "Sum": _fold(torch.add),
    "Mean": Operator(_mean),
    "Clip": Operator(_clip, static=(1, 2)),
    "Cast": Operator(_cast),
    "Gelu": Operator(_gelu),
    "LeakyRelu": Operator(_leaky_relu),
    "Elu": Operator(_elu),
    "Swish": Operator(_swish),
    "HardSigmoid": Operator(_hard_sigmoid),
    "Identity": Operator(_identity),
    "Dropout": Operator(_dropout, static=(1, 2)),
    "IsInf": Operator(_is_inf),
}
"""How each is computed; torch broadcasts as ONNX does."""
