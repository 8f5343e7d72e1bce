"""Elements that carry so much of an error that a sample of their tensor must not miss them.

An attention sink, whose key every query reads, or a channel of the residual stream that is a
hundred times as large as others: a few elements may be most of ``sum h^2 d^2``, with ``h`` the
derivative and ``d`` the rounding error, and to look at one in twenty of them is a gamble. For
floating-point formats ``d`` is about in proportion to the element ``y``, and ``sum h^2 y^2`` over
all elements costs little more than reading them. It tells where the largest are, and what the
sample makes of all others.
"""

from dataclasses import dataclass
from math import isfinite

import torch

from precision_compiler.sampling import blocks_of_sample, in_order

_BLOCK, _MOST = 32, 128
"""Elements that are neighbours in memory and are taken together, and how many such blocks."""

_DOUBT = 0.1
"""Standard deviation of the sample's sum, relative, from which the largest blocks are taken."""

_PIECE = 1 << 17
"""Elements that are multiplied at a time, so that products stay in the cache."""


@dataclass(frozen=True, eq=False)
class Outliers:
    """What a sample of a tensor and its derivatives does not tell.

    Attributes:
        values, adjoint: the elements of the blocks that count most, and their derivatives.
        others: which of the sampled elements are not among them; None where the sample is good
            enough, and there are no such blocks.
        whole: ``sum h^2 y^2`` over all elements, relative to what the sample makes of it.
        rest: the same over the elements that are no outliers.
        lacking: what the sample has too little of that sum even so, relative to the outliers' part.
            Both ratios are at most 2: of many elements that are lost in a narrow format, a sample
            may have none of the few that are not, and says nothing about those.
    """

    values: torch.Tensor
    adjoint: torch.Tensor
    others: torch.Tensor | None
    whole: float
    rest: float
    lacking: float = 0.0


def find_outliers(
    values: torch.Tensor, adjoint: torch.Tensor, seen: torch.Tensor, most: int
) -> Outliers | None:
    """Look at all elements of a tensor that is sampled.

    Args:
        values: float32, of any shape and layout.
        adjoint: derivatives of its elements.
        seen: product of the two where they are sampled.
        most: elements that are sampled, at the most.

    Returns:
        None where the sample is the whole tensor, and where nothing finite depends on it.
    """
    size = values.numel()
    if len(seen) == size:
        return None
    order = in_order(values)
    y, h = (_in_blocks(x.detach().permute(order).reshape(-1)) for x in (values, adjoint))
    norms = _norms(y, h)
    total = float(torch.linalg.vector_norm(norms))
    if not (isfinite(total) and total > 0.0):
        return None
    shares, scale = (norms / total).square_(), size / len(seen)
    known = (seen / total).square_()
    whole = _ratio(1.0, scale * float(known.sum()))
    if scale * float(shares @ shares) <= _DOUBT**2:
        return Outliers(y[:0].flatten(), h[:0].flatten(), None, whole, whole)
    top = shares.topk(_MOST).indices
    of_rest = torch.ones_like(shares).index_fill_(0, top, 0.0)
    others = of_rest.index_select(0, blocks_of_sample(values, _BLOCK, most))
    real, estimated = float(shares @ of_rest), scale * float(known @ others)
    rest = _ratio(real, estimated)
    lacking = max(0.0, real - rest * estimated) / float(shares.index_select(0, top).sum())
    values, adjoint = y.index_select(0, top).flatten(), h.index_select(0, top).flatten()
    return Outliers(values, adjoint, others.bool(), whole, rest, lacking)


def _in_blocks(x: torch.Tensor) -> torch.Tensor:
    """A row as a matrix of blocks, the last one filled up with zeros."""
    short = -len(x) % _BLOCK
    return (torch.nn.functional.pad(x, (0, short)) if short else x).view(-1, _BLOCK)


def _norms(y: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """The root of ``sum h^2 y^2`` of every block."""
    rows = _PIECE // _BLOCK
    pieces = [slice(start, start + rows) for start in range(0, len(y), rows)]
    norms = [torch.linalg.vector_norm(y[piece] * h[piece], dim=1) for piece in pieces]
    return norms[0] if len(norms) == 1 else torch.cat(norms)


def _ratio(real: float, estimated: float) -> float:
    return min(real / estimated, 2.0) if estimated > 0.0 else 1.0
