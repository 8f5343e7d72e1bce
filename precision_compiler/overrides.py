"""Formats that the user insists on: globs over site names, from a file or an argument."""

import os
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from precision_compiler.errors import PlanError
from precision_compiler.files import read_record
from precision_compiler.formats import CHOICES
from precision_compiler.sites import Site, matching

OVERRIDE = "set by the override"
"""How the reason of a site begins that the user decided."""

KEEP = "keep "
"""Prefix that reads better before a wide format: "keep fp32" is "fp32"."""


def read_overrides(path: str | os.PathLike[str]) -> dict[str, str]:
    """Overrides from a TOML file of lines such as ``"blocks.*.fc.wgrad" = "bf16"``.

    Raises:
        PlanError: the file cannot be read, or holds anything else.
    """
    try:
        found = tomllib.loads(read_record(path, "overrides").decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"overrides {path} are not valid TOML: {error}") from error
    for pattern, value in found.items():
        if not isinstance(value, str):
            raise PlanError(
                f'overrides {path}, key {pattern}: give a format in quotes, such as "bf16"'
            )
    return found


def resolved(
    overrides: Mapping[str, str], sites: Iterable[Site], formats: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, str]]:
    """Pattern and format by site.

    Args:
        overrides: format by glob.
        sites: of the graph.
        formats: formats that there are, by kind of site.

    Raises:
        PlanError: a pattern matches no site, a format is unknown or none for the site, or two
            patterns ask for different formats of one site.
    """
    known = {site.name: site for site in sites}
    found: dict[str, tuple[str, str]] = {}
    for pattern, value in overrides.items():
        fmt = _format(pattern, value)
        names = matching(pattern, known)
        if not names:
            near = get_close_matches(pattern.replace("*", ""), known, n=3, cutoff=0.3)
            guess = f"; did you mean {' or '.join(near)}?" if near else ""
            raise PlanError(f"override {pattern!r} matches no site{guess}")
        for name in names:
            if fmt not in formats[known[name].kind]:
                words = ", ".join(formats[known[name].kind])
                raise PlanError(
                    f"override {pattern!r}: {name} cannot be {fmt} on this target; choose one of "
                    f"{words}"
                )
            other = found.get(name)
            if other is not None and other[1] != fmt:
                raise PlanError(
                    f"overrides contradict each other at {name}: {other[0]!r} asks for {other[1]}, "
                    f"{pattern!r} for {fmt}"
                )
            found[name] = pattern, fmt
    return found


def _format(pattern: str, value: str) -> str:
    fmt = value.removeprefix(KEEP).strip()
    if fmt not in CHOICES:
        near = get_close_matches(fmt, CHOICES, n=1)
        guess = f" (did you mean {near[0]}?)" if near else ""
        raise PlanError(
            f"override {pattern!r}: unknown format {value!r}{guess}; formats are "
            f"{', '.join(CHOICES)}"
        )
    return fmt
