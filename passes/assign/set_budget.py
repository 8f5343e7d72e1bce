"""See SetBudget."""

from dataclasses import dataclass, replace
from typing import ClassVar

from precision_compiler.budget import TRUST_REGION, Budget
from precision_compiler.errors import BudgetError, InternalError
from precision_compiler.pipeline import Numerics, Unit

AUTO_NOISE = 0.1
"""Share of the mini-batch noise that "auto" allows: it adds 1 % to the gradient's variance."""


@dataclass(frozen=True)
class SetBudget:
    """Turn the budget that was asked for into the largest allowed gradient error.

    1. A number is the limit itself.
    2. "autocast": the predicted error of torch.autocast's bf16 policy on the same graph.
    3. "noise:x": x times the gradient's standard deviation between mini-batches, relative to the
       gradient of the batch; an error if that could not be estimated.
    4. "auto": the larger of "autocast" and "noise:0.1" (the former alone where the noise is not
       known), but never more than the trust region of 0.2.
    """

    name: ClassVar[str] = "set-budget"
    reads: ClassVar[frozenset[str]] = frozenset({"statistics", "baseline"})
    makes: ClassVar[frozenset[str]] = frozenset({"budget"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Set the limit of ``unit.budget``, and what it rests on."""
        statistics = unit.statistics
        if statistics is None:
            raise InternalError("set-budget ran without statistics")
        measured = replace(
            unit.budget,
            autocast=unit.problem.error(unit.baseline),
            noise=statistics.noise,
            noise_origin=statistics.noise_origin,
        )
        unit.budget = limited(measured)
        unit.journal.note(self.name, f"the limit is {unit.budget.limit:.3g}: {unit.budget.origin}")
        return False


def limited(budget: Budget) -> Budget:
    """The budget with its limit, from what it has measured.

    Raises:
        BudgetError: it asks for the noise, which is not known.
    """
    autocast, noise = budget.autocast, budget.noise
    policy = "predicted error of torch.autocast's bf16 policy on the same graph"
    if budget.asked == "autocast":
        return replace(budget, limit=autocast or 0.0, bound_by="autocast", origin=policy)
    if budget.asked == "auto":
        return _automatic(budget, autocast or 0.0, policy)
    if budget.noise_factor is None:
        return budget
    if noise is None:
        raise BudgetError(
            f"budget {budget.asked} needs the gradient's noise between mini-batches, but "
            f"{budget.noise_origin}: give a number, or 'autocast'"
        )
    origin = f"{budget.noise_factor:g} of the noise {noise:.2g}, from {budget.noise_origin}"
    return replace(budget, limit=budget.noise_factor * noise, bound_by="noise", origin=origin)


def _automatic(budget: Budget, autocast: float, policy: str) -> Budget:
    allowed = AUTO_NOISE * (budget.noise or 0.0)
    found = replace(budget, limit=autocast, bound_by="autocast", origin=policy)
    if budget.noise is None:
        found = replace(found, origin=f"{policy} ({budget.noise_origin})")
    elif allowed > autocast:
        origin = f"{AUTO_NOISE:g} of the noise {budget.noise:.2g}, from {budget.noise_origin}"
        found = replace(budget, limit=allowed, bound_by="noise", origin=origin)
    if found.limit <= TRUST_REGION:
        return found
    origin = f"what first-order analysis can vouch for; {found.origin} would be {found.limit:.2g}"
    return replace(found, limit=TRUST_REGION, bound_by="trust region", origin=origin)
