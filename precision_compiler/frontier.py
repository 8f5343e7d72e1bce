"""The trade-off between time and error of one graph, as a file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from precision_compiler.budget import Budget
from precision_compiler.errors import PlanError
from precision_compiler.files import read_record, write_record
from precision_compiler.journal import STRICT

FRONTIER_VERSION = 1


@dataclass(frozen=True)
class FrontierPoint:
    """One assignment of formats, without its details.

    Attributes:
        error: predicted relative gradient error.
        seconds: predicted time of one forward and backward pass.
        bound_seconds: proven lower bound on the time of any assignment with no larger error; 0
            where nothing is proven.
        gap: (seconds - bound_seconds) / seconds.
        contractions: how many contractions run in each format.
        stores: how many stored tensors are kept in each format.
    """

    __pydantic_config__ = STRICT

    error: float
    seconds: float
    bound_seconds: float
    gap: float
    contractions: Mapping[str, int]
    stores: Mapping[str, int]


@dataclass(frozen=True)
class Frontier:
    """The fastest assignments of one graph from the smallest error to the shortest time.

    All numbers are predictions: a plan made for one of the errors is verified, these are not.

    Attributes:
        schema_version: of the file.
        target: name of the machine.
        fingerprint: hash of the graph's sites.
        loss_origin: where the loss comes from.
        versions: of what made it.
        fp32: float32 everywhere.
        autocast: torch.autocast's bf16 policy.
        budget: what the plan with the default budget was allowed, or the budget asked for.
        chosen: that plan.
        points: in the order of their errors; no point is beaten in both by another.
    """

    __pydantic_config__ = STRICT

    schema_version: int
    target: str
    fingerprint: str
    loss_origin: str
    versions: Mapping[str, str]
    fp32: FrontierPoint
    autocast: FrontierPoint
    budget: Budget
    chosen: FrontierPoint
    points: tuple[FrontierPoint, ...]

    def to_json(self) -> str:
        """The frontier as JSON text."""
        return _ADAPTER.dump_json(self, indent=1).decode() + "\n"

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Frontier":
        """Read a file that ``save`` wrote.

        Raises:
            PlanError: the file cannot be read, or holds no valid frontier.
        """
        text = read_record(path, "frontier")
        try:
            return _ADAPTER.validate_json(text, strict=False)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(f"{path} is no frontier, see {where}: {first['msg']}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the frontier, whole or not at all.

        Raises:
            PlanError: the file cannot be written.
        """
        write_record(path, self.to_json(), "frontier")


_ADAPTER: TypeAdapter[Frontier] = TypeAdapter(Frontier)
