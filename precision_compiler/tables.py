"""What a plan's decision rested on, as data: enough to solve again without the model."""

from collections.abc import Mapping
from dataclasses import dataclass

from precision_compiler.journal import STRICT

Numbers = Mapping[str, float]
"""A number by format."""


@dataclass(frozen=True)
class Reading:
    """One argument of a contraction.

    Attributes:
        contraction: name of its site.
        argument: its position.
        source: name of the graph's node that computes the elements.
        store: the storage site they are kept in; None if their format is not decided.
        companion: whether it is a bias and the like.
        variances: relative variance of the gradient when it is rounded, by the format of the
            contraction.
    """

    __pydantic_config__ = STRICT

    contraction: str
    argument: int
    source: str
    store: str | None
    companion: bool
    variances: Numbers


@dataclass(frozen=True)
class Together:
    """Two readings of one rounded copy: what their variances lack or have in excess together.

    Attributes:
        first, second: positions in the list of readings.
        covariances: of their effects, by format.
    """

    __pydantic_config__ = STRICT

    first: int
    second: int
    covariances: Numbers


@dataclass(frozen=True)
class Tables:
    """The decision problem beside what the plan says of each site.

    Attributes:
        nodes: name of the graph's node, by site.
        readings: all arguments of contractions.
        results: storage sites of each contraction's results.
        casts: seconds of one copy, by source and format.
        fixed_seconds: what formats do not change.
        variances: relative variance of the gradient by storage site (its rounding) and contraction
            site (what it rounds inside), and by format.
        pairs: readings whose effects go together.
        exact: storage sites whose rounding changes nothing once the named ones are as coarse.
        autocast: autocast's policy, by site.
        kept_elements: elements that the backward pass needs, by storage site.
        kept_bytes: bytes of what else it needs.
        most_bytes: limit on both together; None if there is none.
    """

    __pydantic_config__ = STRICT

    nodes: Mapping[str, str]
    readings: tuple[Reading, ...]
    results: Mapping[str, tuple[str, ...]]
    casts: Mapping[str, Numbers]
    fixed_seconds: float
    variances: Mapping[str, Numbers]
    pairs: tuple[Together, ...]
    exact: Mapping[str, tuple[str, ...]]
    autocast: Mapping[str, str]
    kept_elements: Mapping[str, int]
    kept_bytes: float
    most_bytes: float | None
