"""Targets as TOML files: one may build on another, and mistakes are named."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from precision_compiler.errors import TargetError
from precision_compiler.gemm_formats import nearest

SUFFIX = ".toml"
Table = dict[str, Any]


def read_table(path: Path, shipped: Path, above: tuple[Path, ...] = ()) -> Table:
    """The keys of a target's file, on top of those of the target its ``base`` names.

    Tables merge key by key, so a file states only what differs; `remove = ["int8"]` drops formats
    of the base.

    Args:
        path: the file.
        shipped: folder of the targets a ``base`` may name; a path to a file works too.
        above: files that build on this one.

    Raises:
        TargetError: a file cannot be read, is not TOML, or builds on itself.
    """
    path = path.resolve()
    if path in above:
        raise TargetError(f"target {path}, key base: it builds on itself")
    table = _toml(path)
    if "base" not in table:
        return table
    base, removed = table.pop("base"), table.pop("remove", [])
    merged = _merged(read_table(_base_path(base, path, shipped), shipped, (*above, path)), table)
    formats = merged.get("formats", {})
    if not isinstance(formats, dict) or not isinstance(removed, list):
        raise TargetError(f"target {path}, key remove: give a list of formats of the base")
    for name in removed:
        if name not in formats:
            raise TargetError(
                f"target {path}, key remove: no format {name!r}{nearest(name, formats)}"
            )
        del formats[name]
    return merged


def explain(error: ValidationError, path: Path, keys: Mapping[str, tuple[str, ...]]) -> str:
    """One line on the first mistake of a file: its key, and the valid key that is nearest.

    Args:
        error: what pydantic found.
        path: the file.
        keys: valid keys by the table they belong to, "" for the file's top level.
    """
    unknown = ("extra_forbidden", "unexpected_keyword_argument")  # likely why another is missing
    first = min(error.errors(), key=lambda found: found["type"] not in unknown)
    parts = [str(part) for part in first["loc"]]
    where = f"target {path}, key {'.'.join(parts)}"
    if first["type"] in unknown:
        table = parts[0] if len(parts) > 1 else ""
        return f"{where}: unknown key{nearest(parts[-1], keys.get(table, ()))}"
    expected = first.get("ctx", {}).get("expected")
    if expected and isinstance(first["input"], str):
        words = expected.replace(" or ", ", ").replace("'", "").split(", ")
        return f"{where}: unknown value {first['input']!r}{nearest(first['input'], words)}"
    return f"{where}: {first['msg']}"


def _base_path(base: object, path: Path, shipped: Path) -> Path:
    if not isinstance(base, str):
        raise TargetError(f"target {path}, key base: give a target's name or the path of a file")
    if base.endswith(SUFFIX):
        return path.parent / base
    names = sorted(item.stem for item in shipped.glob(f"*{SUFFIX}"))
    if base not in names:
        raise TargetError(f"target {path}, key base: unknown target {base!r}{nearest(base, names)}")
    return shipped / f"{base}{SUFFIX}"


def _merged(below: Table, above: Table) -> Table:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = _merged(old, value)
        merged[key] = value
    return merged


def _toml(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(
            f"cannot read the target {path}: {os.strerror(error.errno or 0)}"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TargetError(f"target {path} is not valid TOML: {error}") from error
