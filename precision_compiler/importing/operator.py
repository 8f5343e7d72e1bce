"""One ONNX operator: how to compute it with torch, and what must be known to trace it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from precision_compiler.errors import OnnxImportError


@dataclass(frozen=True)
class Operator:
    """A row of the operator table.

    Attributes:
        run: computes the node. It gets the inputs by position, None for those that are left out,
            and the attributes by their ONNX names; it returns one tensor or, for several outputs,
            a tuple. The first output is the last thing it computes.
        static: positions of inputs that decide shapes and the like: they must be known before
            any data is, and arrive as Python lists or numbers.
        numbers: positions where a constant of one element arrives as a Python number.
        of_shape: whether the result depends on the shapes of the inputs only.
        counts: whether ``run`` takes the number of the node's outputs, as ``outputs``.
    """

    run: Callable[..., Any]
    static: tuple[int, ...] = ()
    numbers: tuple[int, ...] = ()
    of_shape: bool = False
    counts: bool = False


Table = dict[str, Operator]


def require(fact: bool, sentence: str) -> None:
    """Refuse what an operator's row cannot do.

    Raises:
        OnnxImportError: the fact does not hold; the importer adds the node's name.
    """
    if not fact:
        raise OnnxImportError(sentence)


def axes_of(axes: Any, rank: int) -> list[int]:
    """Axes as a list of numbers from 0 on; all of them for None or an empty list."""
    found = [axes] if isinstance(axes, int) else list(axes or range(rank))
    return [axis % rank for axis in found] if rank else []
