"""See BorrowStatistics."""

from dataclasses import dataclass
from typing import ClassVar

from precision_compiler.flags import Flag
from precision_compiler.paper import borrowed, lend
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.plan import Plan
from precision_compiler.statistics import Statistics


@dataclass(frozen=True)
class BorrowStatistics:
    """Take the error of every rounding from a smaller model's plan, or from the formats alone.

    For models that cannot be run here.

    1. A site of the sibling with the same name but for its layer's number, at the same relative
       depth, lends its errors and vetoes; squared errors are shared out over more layers.
    2. Sites that no sibling has get a closed form of the format.
    3. What a contraction rounds is known in total only: an operand that is stored in the same
       format already is counted again, which errs on the safe side.
    4. A flag says how much of the plan rests on what.

    Attributes:
        sibling: a plan of a smaller model of the same kind, made on real batches.
    """

    sibling: Plan | None = None
    name: ClassVar[str] = "borrow-statistics"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"statistics"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.statistics`` and the sibling's vetoes."""
        loans = lend(unit.joint.sites, unit.target.choices, self.sibling)
        nothing = borrowed({})
        known = {name: borrowed(loan.variances) for name, loan in loans.items()}
        unit.statistics = Statistics(
            stores={name: known[name] for name in unit.links.stores},
            operands={(link.contraction, link.argument): nothing for link in unit.links.reads},
            internals={
                name: (borrowed(loans[name].variances),) for name in unit.links.contractions
            },
            noise_origin="there are no values to estimate it from",
            batches=0,
        )
        for name, loan in loans.items():
            unit.vetoes |= {(name, fmt): why for fmt, why in loan.vetoes.items()}
        lent = sum(loan.lender is not None for loan in loans.values())
        sentence = (
            f"errors were not measured: those of {lent} of {len(loans)} sites are a smaller "
            "sibling's, the others follow from the formats alone: calibrate before training"
        )
        numbers = {"borrowed": float(lent), "sites": float(len(loans))}
        unit.flags.append(Flag("unmeasured", "", None, sentence, numbers, False))
        unit.journal.note(self.name, sentence)
        return False
