"""Published times of matrix products against the targets' time model.

Reads every benchmarks/data/gemm_*.json: tables of published times with their source, marked
"fitted" where the model's parameters come from them and "held out" where nothing was chosen after
looking at them. Prints the error of each table and, with --rows, of each row; writes JSON.
Run: python benchmarks/gemm_tables.py -o gemm_tables.json
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from precision_compiler.target import Target

DATA = Path(__file__).parent / "data"
CLOSE = 0.05
"""Times that differ by less are not ranked: published runs of one product differ by as much."""


@dataclass(frozen=True)
class Row:
    """One published time, of one product or the sum of several, and the model's, in seconds."""

    label: str
    format: str
    scaling: str
    published: float
    predicted: float

    @property
    def error(self) -> float:
        """Predicted over published, less 1."""
        return self.predicted / self.published - 1


@dataclass(frozen=True)
class Comparison:
    """One published table against the model.

    Attributes:
        name: of the table.
        target: the model's machine.
        use: "fitted" or "held out".
        source: where it was published.
        rows: its cells.
    """

    name: str
    target: str
    use: str
    source: str
    rows: tuple[Row, ...]

    @property
    def mean_error(self) -> float:
        """Mean absolute relative error."""
        return sum(abs(row.error) for row in self.rows) / len(self.rows)

    @property
    def bias(self) -> float:
        """Mean relative error."""
        return sum(row.error for row in self.rows) / len(self.rows)

    def rankings(self) -> tuple[int, int]:
        """Pairs of formats for one product that the model ranks rightly, and all such pairs."""
        by_product: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            by_product[row.label].append(row)
        right = [
            (one.published < other.published) == (one.predicted < other.predicted)
            for rows in by_product.values()
            for one, other in combinations(rows, 2)
            if abs(one.published - other.published) > CLOSE * min(one.published, other.published)
        ]
        return sum(right), len(right)


def comparisons(folder: Path = DATA) -> Iterator[Comparison]:
    """Every published table of the folder, predicted."""
    for path in sorted(folder.glob("gemm_*.json")):
        for table in json.loads(path.read_text(encoding="utf-8"))["tables"]:
            target = replace(Target.load(table["target"]), **table.get("overrides", {}))
            rows = tuple(_row(target, row) for row in table["rows"])
            yield Comparison(table["name"], table["target"], table["use"], table["source"], rows)


def _row(target: Target, row: dict[str, Any]) -> Row:
    predicted = sum(
        target.gemm_seconds(**product, format=row["format"], scaling=row["scaling"])
        for product in row["products"]
    )
    published = row["milliseconds"] / 1e3
    return Row(row["label"], row["format"], row["scaling"], published, predicted)


def summary(table: Comparison) -> str:
    """One line: use, name, rows, errors, rankings."""
    right, pairs = table.rankings()
    ranked = f"{right}/{pairs} ranked" if pairs else ""
    return (
        f"{table.use:9} {table.name:46} {len(table.rows):3} rows  error {table.mean_error:6.1%}"
        f"  bias {table.bias:+6.1%}  {ranked}"
    )


def main() -> None:
    """Print the tables and write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, help="where to write JSON")
    parser.add_argument("--rows", action="store_true", help="also print every row")
    options = parser.parse_args()
    tables = list(comparisons())
    for table in tables:
        print(summary(table))
        for row in table.rows if options.rows else ():
            times = f"{row.published * 1e3:9.4f} ms  model {row.predicted * 1e3:9.4f} ms"
            print(f"  {row.label:26} {row.format:6} {row.scaling:8} {times} {row.error:+7.1%}")
    for use in ("fitted", "held out"):
        errors = [abs(row.error) for table in tables if table.use == use for row in table.rows]
        print(f"{use}: mean error {sum(errors) / len(errors):.1%} over {len(errors)} rows")
    if options.output:
        record = [
            {**asdict(table), "mean_error": table.mean_error, "rankings": table.rankings()}
            for table in tables
        ]
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
