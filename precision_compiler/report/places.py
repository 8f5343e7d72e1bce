"""Where in the model a site lies, read from its name: layer, module, direction. And groups of them.

`blocks.3.attn.sdpa.dgrad.0.store` is in layer `blocks.3`, module `attn.sdpa`, column `dgrad kept`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from precision_compiler.plan import SiteChoice

By = Literal["layer", "op", "role"]
GROUPINGS: tuple[By, ...] = ("layer", "op", "role")

DIRECTIONS = ("fprop", "dgrad", "wgrad")
COLUMNS = tuple(f"{way}{kept}" for way in DIRECTIONS for kept in ("", " kept"))
"""Columns of the grid: what computes in each direction, and where its result is kept."""

OUTSIDE = "outside the layers"


@dataclass(frozen=True)
class Place:
    """Where a site lies.

    Attributes:
        layer: path up to the layer's number; empty outside of numbered layers.
        module: the rest of the path, without roles.
        column: one of COLUMNS.
    """

    layer: str
    module: str
    column: str


@dataclass(frozen=True)
class Section:
    """A layer, or a run of modules outside of layers: one block of rows of the grid.

    Attributes:
        name: the layer, or OUTSIDE.
        rows: positions of sites in the plan by column, by module, all in graph order.
    """

    name: str
    rows: dict[str, dict[str, list[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteGroup:
    """Sites that share a layer, operation or role.

    Attributes:
        name: what they share.
        sites: how many there are.
        formats: how many of them have each format, the commonest first.
        seconds: their predicted time.
        variance_share: their share of the predicted error's variance.
        vetoes: formats that were ruled out at one of them, counted.
    """

    name: str
    sites: int
    formats: Mapping[str, int]
    seconds: float
    variance_share: float
    vetoes: int


def places_of(sites: Mapping[str, SiteChoice]) -> dict[str, Place]:
    """The places of sites, by their names and roles."""
    paths, roles = {}, {}
    for name in sites:
        parts = name.split(".")
        roles[name] = _take_roles(parts)
        paths[name] = tuple(parts)
    numbers = layer_numbers(paths.values())
    found = {}
    for name, choice in sites.items():
        path, place = paths[name], numbers[paths[name]]
        way = next((role for role in (choice.role, *roles[name]) if role in DIRECTIONS), None)
        if way is None:
            way = "dgrad" if "grad" in roles[name] else "fprop"
        cut = 0 if place is None else place + 1
        column = way if choice.kind == "contraction" else f"{way} kept"
        found[name] = Place(".".join(path[:cut]), ".".join(path[cut:]), column)
    return found


def layer_numbers(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], int | None]:
    """Which part of each module's path is the number of its layer; None where there is none.

    Of several numbers it is the first that is not the same everywhere: not the 0 of
    `model.0.encoder.layer.3.attention`, where nothing is called `model.1`.
    """
    alike: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for path in dict.fromkeys(paths):
        alike[tuple("*" if part.isdecimal() else part for part in path)].append(path)
    found: dict[tuple[str, ...], int | None] = {}
    for pattern, members in alike.items():
        places = [place for place, part in enumerate(pattern) if part == "*"]
        several = (place for place in places if len({path[place] for path in members}) > 1)
        found.update(dict.fromkeys(members, next(several, places[0] if places else None)))
    return found


def sections_of(sites: Mapping[str, SiteChoice]) -> list[Section]:
    """The rows of the grid: layers in graph order, with what lies before and after them."""
    sections: list[Section] = []
    by_layer: dict[str, Section] = {}
    for position, place in enumerate(places_of(sites).values()):
        section = by_layer.get(place.layer)
        if section is None or _starts_anew(place, section, sections):
            section = by_layer[place.layer] = Section(place.layer or OUTSIDE)
            sections.append(section)
        row = section.rows.setdefault(place.module, {})
        row.setdefault(place.column, []).append(position)
    return sections


def groups_of(sites: Mapping[str, SiteChoice], by: By) -> list[SiteGroup]:
    """Sites put together by layer, operation or role, in graph order."""
    members: dict[str, list[SiteChoice]] = defaultdict(list)
    places = places_of(sites)
    for name, choice in sites.items():
        keys = {"layer": places[name].layer or OUTSIDE, "op": choice.op, "role": choice.role}
        members[keys[by]].append(choice)
    return [_group(key, choices) for key, choices in members.items()]


def _take_roles(parts: list[str]) -> list[str]:
    """Removes the roles that end a name and returns them, the last one first."""
    roles: list[str] = []
    while parts:
        if len(parts) > 1 and parts[-1].isdecimal() and parts[-2] in DIRECTIONS and roles:
            parts.pop()  # the number of an output
        elif parts[-1] in (*DIRECTIONS, "grad", "store"):
            roles.append(parts.pop())
        else:
            break
    return roles


def _starts_anew(place: Place, section: Section, sections: list[Section]) -> bool:
    """Whether a module outside of layers comes after layers that its section came before."""
    return not place.layer and place.module not in section.rows and sections[-1] is not section


def _group(name: str, choices: Iterable[SiteChoice]) -> SiteGroup:
    members = list(choices)
    return SiteGroup(
        name=name,
        sites=len(members),
        formats=dict(Counter(choice.format for choice in members).most_common()),
        seconds=sum(choice.seconds for choice in members),
        variance_share=sum(choice.variance_share for choice in members),
        vetoes=sum(
            option.veto is not None for choice in members for option in choice.options.values()
        ),
    )
