"""The plan: what was decided for every site and node of a graph, why, and at which price."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from precision_compiler.errors import BudgetError, PlanError
from precision_compiler.formats import FORMATS
from precision_compiler.journal import STRICT, JournalEntry

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Budget:
    """The allowed relative gradient error ``||dG|| / ||G||``.

    Attributes:
        asked: what the user asked for, a number or "autocast".
        limit: the number it came to.
        origin: a sentence on how the limit was found.
    """

    __pydantic_config__ = STRICT

    asked: str
    limit: float
    origin: str

    @staticmethod
    def parse(asked: float | str) -> "Budget":
        """Read what the user asked for; "autocast" gets its limit once it is scored.

        Raises:
            BudgetError: neither a positive number nor "autocast".
        """
        if asked == "autocast":
            return Budget("autocast", float("inf"), "not scored yet")
        try:
            limit = float(asked)
        except (TypeError, ValueError):
            limit = -1.0
        if not (isfinite(limit) and limit >= 0):
            raise BudgetError(
                f"budget {asked!r} is neither 'autocast' nor a finite number >= 0: pass the "
                "largest allowed relative gradient error, for example 0.01"
            )
        return Budget(f"{limit:g}", limit, "set by the user")


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
        error: predicted relative gradient error that the site causes alone.
        variance_share: its share of the plan's predicted error variance, 0 to 1.
        options: every format considered.
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


@dataclass(frozen=True)
class Totals:
    """Sums over the plan.

    Attributes:
        predicted_seconds: time of one forward and backward pass, as far as formats decide it.
        predicted_gradient_error: relative gradient error.
        bound_seconds: no assignment within the budget is faster than this (proven).
        gap: (predicted - bound) / predicted.
        fp32_seconds: predicted time of everything in float32.
        autocast_seconds: predicted time of torch.autocast's bf16 policy over the same sites.
        autocast_gradient_error: predicted error of that policy.
        casts: cast nodes the rewriting inserts.
    """

    __pydantic_config__ = STRICT

    predicted_seconds: float
    predicted_gradient_error: float
    bound_seconds: float
    gap: float
    fp32_seconds: float
    autocast_seconds: float
    autocast_gradient_error: float
    casts: int


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

    @property
    def predicted_gradient_error(self) -> float:
        """Predicted relative gradient error of the whole plan."""
        return self.totals.predicted_gradient_error

    @property
    def predicted_seconds(self) -> float:
        """Predicted time of one forward and backward pass in seconds."""
        return self.totals.predicted_seconds

    @property
    def assignment(self) -> dict[str, str]:
        """Format by site name."""
        return {name: choice.format for name, choice in self.sites.items()}

    @cached_property
    def digest(self) -> str:
        """Hash of the decisions: two plans with the same digest rewrite a graph alike."""
        text = json.dumps(sorted(self.assignment.items()))
        return hashlib.sha256(f"{self.fingerprint}{text}".encode()).hexdigest()

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
            if choice.format not in FORMATS:
                raise PlanError(f"{origin} gives {name} the unknown format {choice.format!r}")
        return plan

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Plan":
        """Read a plan file.

        Raises:
            PlanError: the file cannot be read, or holds no valid plan.
        """
        try:
            text = Path(path).read_bytes()
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        return Plan.from_json(text, str(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all.

        Raises:
            PlanError: the file cannot be written.
        """
        try:
            write_atomically(Path(path), self.to_json())
        except OSError as error:
            raise PlanError(f"cannot write the plan {path}: {error.strerror}") from error

    def diff(self, other: "Plan") -> tuple[SiteDifference, ...]:
        """Sites whose format differs in ``other``, in this plan's order, then its own new ones."""
        names = [*self.sites, *(name for name in other.sites if name not in self.sites)]
        mine, theirs = self.assignment, other.assignment
        pairs = ((name, mine.get(name), theirs.get(name)) for name in names)
        return tuple(SiteDifference(*pair) for pair in pairs if pair[1] != pair[2])


def write_atomically(path: Path, text: str) -> None:
    """Write a text file through a temporary one beside it."""
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with temporary.open("x", encoding="utf-8") as stream:
            stream.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _finite(number: str) -> float:
    """Read a number of a plan file: JSON knows neither infinity nor NaN."""
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"the number {number} is not finite")
    return value


_ADAPTER: TypeAdapter[Plan] = TypeAdapter(Plan)
