"""Sums as they are added up: partial sums in narrow formats, and terms that pull one way."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from precision_compiler.accumulation import (
    RESULTS,
    Accumulator,
    partial_sum_variance,
    products,
    same_sign_terms,
)
from precision_compiler.graph import contraction_rule
from precision_compiler.reductions import adds_up
from precision_compiler.sampling import sampled
from precision_compiler.statistics import Accumulated


@dataclass(frozen=True)
class Summed:
    """Partial sums of some results of a matrix product.

    Attributes:
        rows: where the results are in a sample of all of them.
        variances: of each result, by format that it is added up in.
        terms: terms of one sign, on average.
    """

    rows: torch.Tensor
    variances: Mapping[str, torch.Tensor]
    terms: float

    def weighed(self, adjoint: torch.Tensor, size: int) -> dict[str, Accumulated]:
        """What they do to the objective, by format.

        Args:
            adjoint: derivatives of the sampled results.
            size: number of all results.
        """
        squares = adjoint[self.rows].double().square()
        return {
            name: Accumulated(float((squares * variances).mean()) * size, self.terms)
            for name, variances in self.variances.items()
        }


def summed(
    node: fx.Node,
    value: torch.Tensor,
    args: tuple[Any, ...],
    accumulators: Mapping[str, Accumulator],
) -> Summed | None:
    """Partial sums of a matrix product in every narrow running sum; None of other contractions."""
    rule = contraction_rule(node)
    operands = [args[index].detach() for index in rule.operands] if rule else []
    if len(operands) != 2 or operands[0].dim() != operands[1].dim() or operands[0].dim() > 3:
        return None  # attention and convolutions
    shown = sampled(torch.arange(value.numel(), device=value.device).view(value.shape))
    rows = torch.arange(0, len(shown), -(-len(shown) // RESULTS), device=value.device)
    terms = products(operands[0], operands[1], shown[rows], tuple(value.shape))
    found = {name: partial_sum_variance(terms, how) for name, how in accumulators.items()}
    return Summed(rows, found, same_sign_terms(terms))


def one_way_terms(node: fx.Node, args: tuple[Any, ...], total: torch.Tensor) -> float | None:
    """``n |mean| / rms``, root mean square over the sums: terms that pull the same way.

    None of operations that do not add up.
    """
    terms = args[0] if torch.Tag.reduction in getattr(node.target, "tags", ()) else None
    if not isinstance(terms, torch.Tensor) or not terms.is_floating_point() or not total.numel():
        return None
    row = sampled(terms).double()
    rms, mean = float(row.square().mean()) ** 0.5, abs(float(row.mean()))
    if rms == 0.0 or not adds_up(node):
        return None
    ratio: float = terms.numel() / total.numel() * mean / rms
    return ratio
