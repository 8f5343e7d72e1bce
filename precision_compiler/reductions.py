"""What reductions do with their terms, told by their derivatives and not by their names."""

from math import prod

import torch
from torch import fx

from precision_compiler.graph import shape_of, value_of
from precision_compiler.replay import execute

_TRIED = 3  # elements along each dimension of the tensor that a reduction is tried on


def adds_up(node: fx.Node) -> bool:
    """Whether a node is a sum or mean: the derivative is the same for every term, and not zero."""
    slope = _slope(node)
    return slope is not None and bool((slope == slope.flatten()[0]).all() and slope.any())


def selects(node: fx.Node) -> bool:
    """Whether a node gives some of its terms, such as the largest, unchanged."""
    slope = _slope(node)
    return slope is not None and set(slope.flatten().tolist()) == {0.0, 1.0}


def _slope(node: fx.Node) -> torch.Tensor | None:
    """The derivative of all results together, by a few terms that are all different.

    None of operations that reduce nothing, or give several results or whole numbers.
    """
    if torch.Tag.reduction not in getattr(node.target, "tags", ()):
        return None
    terms, *others = node.args
    if not isinstance(terms, fx.Node) or any(isinstance(other, fx.Node) for other in others):
        return None
    like = value_of(terms)
    if like is None or not like.is_floating_point() or not like.numel():
        return None
    shape = [min(size, _TRIED) for size in shape_of(terms)]
    with torch.enable_grad():
        leaf = torch.arange(1, prod(shape) + 1, dtype=like.dtype).reshape(shape).requires_grad_()
        total = execute(node, (leaf, *others), dict(node.kwargs))
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            return None
        (slope,) = torch.autograd.grad(total.sum(), leaf)
    return slope
