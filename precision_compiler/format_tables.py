"""The tables of ``docs/formats.md``, written from the data."""

from collections.abc import Sequence
from math import frexp

from precision_compiler.formats import E8M0, FORMATS, Format, predicted_sqnr
from precision_compiler.scaling import SCALED_FORMATS, SCALINGS, Scaling

_WHO = {
    "none": "no scale",
    "tensor": "whole tensor",
    "row": "all elements along the summed axis",
}
_NAMES = {scaling: name for name, scaling in SCALINGS.items()}
_WHICH = {
    "power_of_two": "power of two",
    "fp32": "amax / largest, float32",
    "e8m0": "e8m0",
    "e4m3": "e4m3, and a float32 number per tensor",
}


def updated(page: str) -> str:
    """The page with the table after each ``<!-- name table -->`` line written anew."""
    tables = {
        "element": element_table,
        "scaling": scaling_table,
        "scaled": scaled_table,
        "recipe": recipe_table,
    }
    for name, table in tables.items():
        before, mark, after = page.partition(f"<!-- {name} table -->\n")
        page = before + mark + table() + after[after.index("\n\n") :]
    return page


def element_table() -> str:
    """One row of Markdown per element format: storage, range, special numbers, noise."""
    head = ("format", "bits", "p", "largest", "smallest normal", "smallest", "inf", "NaN", "-0")
    rows = [_element_row(fmt) for fmt in (*FORMATS.values(), E8M0)]
    return _table((*head, "SQNR, dB"), rows)


def scaled_table() -> str:
    """One row of Markdown per block format: elements, who shares a scale, which, storage."""
    rows = [
        (row.name, row.element.name, _NAMES[row.scaling], f"{row.bits:g}")
        for row in SCALED_FORMATS.values()
        if not row.base
    ]
    return _table(("format", "elements", "scaling", "bits per element"), rows)


def recipe_table() -> str:
    """One row of Markdown per recipe: whose products, and how their operands are made."""
    head = ("recipe", "products of", "scaling", "of weights", "gradients", "rotated", "roles")
    rows = [
        (
            row.name,
            row.base,
            _NAMES[row.scaling],
            _NAMES[row.weight_scaling] if row.weight_scaling else "the same",
            row.gradients,
            "yes" if row.rotated else "no",
            ", ".join(row.roles) or "all",
        )
        for row in SCALED_FORMATS.values()
        if row.base
    ]
    return _table(head, rows)


def scaling_table() -> str:
    """One row of Markdown per scaling: who shares a scale, which one, how it is rounded."""
    rows = [
        (name, _who(row), _WHICH[row.scale] if name != "none" else "", _rounded(row))
        for name, row in SCALINGS.items()
    ]
    return _table(("scaling", "who shares a scale", "scale", "rounded"), rows)


def _element_row(fmt: Format) -> tuple[str, ...]:
    smallest = fmt.smallest_subnormal if fmt.signed else 2.0**fmt.min_exponent
    flags = (fmt.has_infinity, fmt.has_nan, fmt.has_negative_zero)
    return (
        fmt.name,
        str(fmt.bits),
        str(fmt.precision),
        f"{fmt.max_finite:.6g}" if fmt.signed else _power(fmt.max_finite),
        _power(2.0**fmt.min_exponent),
        _power(smallest),
        *("yes" if flag else "no" for flag in flags),
        f"{predicted_sqnr(fmt):.1f}" if fmt.signed else "",
    )


def _power(value: float) -> str:
    return f"2^{frexp(value)[1] - 1}"


def _who(row: Scaling) -> str:
    if row.granularity == "block":
        return f"{row.size} neighbours along the summed axis"
    if row.granularity == "block2d":
        return f"{row.size} x {row.size} neighbours in the last two dimensions"
    return _WHO[row.granularity]


def _rounded(row: Scaling) -> str:
    if row.scale in ("power_of_two", "e8m0") and row.granularity != "none":
        return row.rounding
    return "to nearest" if row.granularity != "none" else ""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
