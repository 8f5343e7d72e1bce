"""The plan: what was decided for every site and node of a graph, why, and at which price."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from precision_compiler.budget import Budget
from precision_compiler.errors import PlanError
from precision_compiler.files import read_record, write_record
from precision_compiler.flags import Flag
from precision_compiler.formats import CHOICES
from precision_compiler.journal import STRICT, JournalEntry
from precision_compiler.outcomes import Totals, Trial, Verification
from precision_compiler.tables import Tables

if TYPE_CHECKING:
    from precision_compiler.explain import Explanation

SCHEMA_VERSION = 4


@dataclass(frozen=True)
class Option:
    """One format a site could have had.

    Attributes:
        seconds: predicted time of the site itself in that format.
        error: predicted relative gradient error the site would cause in it, alone.
        veto: why it was ruled out, None if it was not.
    """

    __pydantic_config__ = STRICT

    seconds: float
    error: float
    veto: str | None = None


@dataclass(frozen=True)
class Range:
    """How large the elements of one tensor are.

    Attributes:
        tensor: which one of the site's: "stored", or "operand 0" and so on.
        amax: largest magnitude.
        lowest: binary exponent of the first binade in ``shares``.
        shares: of the elements that are not zero, per binade from there upwards.
    """

    __pydantic_config__ = STRICT

    tensor: str
    amax: float
    lowest: int
    shares: tuple[float, ...]


@dataclass(frozen=True)
class SiteChoice:
    """What was decided for one site.

    Attributes:
        kind: "contraction": the format its operands enter in; "storage": the format it is kept in.
        role: fprop, dgrad, wgrad or store.
        op: ATen operation.
        signature: operation and the dimensions that do not depend on the batch.
        shape: output shape on the batch the plan was made with.
        format: the chosen format.
        reason: a sentence.
        seconds: predicted time of the site.
        error: predicted relative gradient error that the site causes between its neighbours in
            the plan; options say what it would cause with everything around it in float32.
        variance_share: its share of the plan's predicted error variance, 0 to 1.
        options: every format considered.
        ranges: of the stored tensor, or of the operands; none where nothing was measured.
    """

    __pydantic_config__ = STRICT

    kind: Literal["contraction", "storage"]
    role: Literal["fprop", "dgrad", "wgrad", "store"]
    op: str
    signature: str
    shape: tuple[int, ...]
    format: str
    reason: str
    seconds: float
    error: float
    variance_share: float
    options: Mapping[str, Option]
    ranges: tuple[Range, ...] = ()


@dataclass(frozen=True)
class NodeChoice:
    """What one node of the rewritten graph computes and stores in.

    Attributes:
        name: stable name.
        op: operation.
        site: the site it carries out, if any.
        compute_format: format of its arithmetic (operands of a contraction, else float32
            registers or the dtype the model itself asked for).
        storage_format: dtype of its result.
        reason: a sentence.
        seconds: predicted time, 0 where it fuses into a neighbour.
        error: predicted relative gradient error it causes.
        vetoes: formats that its result would not survive in, and why.
    """

    __pydantic_config__ = STRICT

    name: str
    op: str
    site: str | None
    compute_format: str
    storage_format: str
    reason: str
    seconds: float
    error: float
    vetoes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteDifference:
    """A site that two plans treat differently; None: the plan has no such site."""

    site: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Plan:
    """Formats for every site and node of one model's graph on one target.

    Attributes:
        schema_version: version of the file format.
        target: name of the machine.
        budget: allowed error.
        fingerprint: hash of the contraction sites and their shapes.
        loss_origin: where the loss that was analysed comes from.
        versions: versions of what made the plan.
        totals: sums.
        sites: choice by site name, in graph order.
        nodes: every computing node of the rewritten graph.
        journal: what each pass did.
        flags: what may go wrong, vetoes included.
        verification: the check on a batch; None if there was none.
        trial: the steps that were timed; None if there were none.
        tables: what the decision rested on; None in plans that were not solved for.
        measures: what the errors are of: the parameters' gradients, or, in plans for inference,
            the outputs.
    """

    __pydantic_config__ = STRICT

    schema_version: int
    target: str
    budget: Budget
    fingerprint: str
    loss_origin: str
    versions: Mapping[str, str]
    totals: Totals
    sites: Mapping[str, SiteChoice]
    nodes: tuple[NodeChoice, ...]
    journal: tuple[JournalEntry, ...]
    flags: tuple[Flag, ...] = ()
    verification: Verification | None = None
    trial: Trial | None = None
    tables: Tables | None = None
    measures: Literal["gradients", "outputs"] = "gradients"

    @property
    def predicted_gradient_error(self) -> float:
        """Predicted relative error of the whole plan, of what it ``measures``."""
        return self.totals.predicted_gradient_error

    @property
    def predicted_seconds(self) -> float:
        """Predicted time of one pass in seconds, forward and backward in training."""
        return self.totals.predicted_seconds

    @property
    def assignment(self) -> dict[str, str]:
        """Format by site name."""
        return {name: choice.format for name, choice in self.sites.items()}

    def explain(self, site: str) -> "Explanation":
        """Why a site has its format, and what every other would cost (by solving again).

        Raises:
            PlanError: there is no such site, or the plan does not carry its decision problem.
        """
        from precision_compiler.explain import explain  # which itself reads plans

        return explain(self, site)

    def edit(self, overrides: Mapping[str, str]) -> "Plan":
        """A plan with formats that you insist on, everything else decided anew without the model.

        Args:
            overrides: format by glob over site names: ``{"blocks.*.fc.wgrad": "bf16"}``.

        Raises:
            PlanError, BudgetError: see ``precision_compiler.edit``.
        """
        from precision_compiler.edit import edit  # which itself reads plans

        return edit(self, overrides)

    def with_formats(self, assignment: Mapping[str, str]) -> "Plan":
        """A plan to carry out with other formats; what it says of times and errors is not theirs.

        Args:
            assignment: format by site, for every site.
        """
        sites = {
            name: replace(choice, format=assignment[name]) for name, choice in self.sites.items()
        }
        return replace(self, sites=sites)

    @cached_property
    def digest(self) -> str:
        """Hash of the decisions: two plans with the same digest rewrite a graph alike."""
        return digest_of(self.fingerprint, self.assignment)

    def to_json(self) -> str:
        """The plan as JSON text."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @staticmethod
    def from_json(text: str | bytes, origin: str = "the plan") -> "Plan":
        """Read a plan from JSON text.

        Raises:
            PlanError: it is no plan of this schema version, or names unknown formats.
        """
        try:
            record = json.loads(text, parse_float=_finite, parse_constant=_finite)
            version = record.get("schema_version")
            if version != SCHEMA_VERSION:
                raise PlanError(
                    f"{origin} has schema version {version}, this program reads {SCHEMA_VERSION}: "
                    "make the plan again"
                )
            plan = _ADAPTER.validate_json(text, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{origin} is corrupt at {where}: {first['msg']}") from error
        except (ValueError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"{origin} is not a plan ({error}): make it with 'precision-compiler plan'"
            ) from error
        for name, choice in plan.sites.items():
            if choice.format not in CHOICES:
                raise PlanError(f"{origin} gives {name} the unknown format {choice.format!r}")
        return plan

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file.

        Raises:
            PlanError: the file cannot be read, or holds no valid plan.
        """
        return Plan.from_json(read_record(path, "plan"), str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all.

        Raises:
            PlanError: the file cannot be written.
        """
        write_record(path, self.to_json(), "plan")

    def _repr_html_(self) -> str:
        """A compact table for notebooks: totals, then formats by role."""
        totals, counts = self.totals, Counter((c.role, c.format) for c in self.sites.values())
        rows: list[tuple[object, ...]] = [
            ("", "ms", "gradient error"),
            (
                "plan",
                f"{totals.predicted_seconds * 1e3:.3g}",
                f"{self.predicted_gradient_error:.2g}",
            ),
            (
                "autocast",
                f"{totals.autocast_seconds * 1e3:.3g}",
                f"{totals.autocast_gradient_error:.2g}",
            ),
            ("fp32", f"{totals.fp32_seconds * 1e3:.3g}", "0"),
            ("budget", self.budget.asked, f"{self.budget.limit:.2g}"),
            ("role", "format", f"{len(self.sites)} sites"),
            *((*key, count) for key, count in sorted(counts.items())),
        ]
        cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<table><caption>Plan for {escape(self.target)}</caption>{body}</table>"

    def diff(self, other: "Plan") -> tuple[SiteDifference, ...]:
        """Sites whose format differs in ``other``, in this plan's order, then its own new ones."""
        names = [*self.sites, *(name for name in other.sites if name not in self.sites)]
        mine, theirs = self.assignment, other.assignment
        pairs = ((name, mine.get(name), theirs.get(name)) for name in names)
        return tuple(SiteDifference(*pair) for pair in pairs if pair[1] != pair[2])


def digest_of(fingerprint: str, assignment: Mapping[str, str]) -> str:
    """Hash of a graph's fingerprint and the formats of its sites."""
    text = json.dumps(sorted(assignment.items()))
    return hashlib.sha256(f"{fingerprint}{text}".encode()).hexdigest()


def _finite(number: str) -> float:
    """Read a number of a plan file: JSON knows neither infinity nor NaN."""
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"the number {number} is not finite")
    return value


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)
