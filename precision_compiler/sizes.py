"""Sizes that may be symbolic."""

import re

import torch

from precision_compiler.errors import BudgetError

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number; of a symbolic one its hint, without pinning it down by a guard."""
    return size if isinstance(size, int) else int(size.node.hint or 1)


def bytes_of(size: float | str) -> float:
    """A number of bytes: 4e10, "40GB", "37.2 GiB".

    Raises:
        BudgetError: it is no positive number, or has another unit.
    """
    found = re.fullmatch(r"\s*([0-9.eE+]+)\s*([a-zA-Z]*)\s*", str(size))
    unit = found[2].lower() if found else ""
    try:
        number = float(found[1]) if found else 0.0
    except ValueError:
        number = 0.0
    if unit not in _UNITS or not 0 < number < float("inf"):
        raise BudgetError(
            f"memory {size!r} is no size: give bytes, or a number with KB, MB, GB, TB, KiB, MiB, "
            "GiB or TiB, such as '40GB'"
        )
    return number * _UNITS[unit]


def readable_bytes(size: float) -> str:
    """Bytes for people: three digits and a unit."""
    for unit in ("TB", "GB", "MB", "KB"):
        if size >= _UNITS[unit.lower()]:
            return f"{size / _UNITS[unit.lower()]:.3g} {unit}"
    return f"{size:.0f} bytes"
