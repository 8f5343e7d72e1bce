"""The page about formats shows the data that the package has."""

from pathlib import Path

from precision_compiler.format_tables import (
    element_table,
    recipe_table,
    scaled_table,
    scaling_table,
    updated,
)
from precision_compiler.formats import FORMATS
from precision_compiler.scaling import RECIPES, SCALED_FORMATS, SCALINGS

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"


def test_the_page_has_the_tables_that_the_data_makes() -> None:
    page = PAGE.read_text(encoding="utf-8")
    message = "write updated(page) of precision_compiler.format_tables to docs/formats.md"
    assert page == updated(page), message


def test_every_row_of_the_data_has_its_line() -> None:
    for table, names in (
        (element_table(), (*FORMATS, "e8m0")),
        (scaling_table(), SCALINGS),
        (scaled_table(), [name for name in SCALED_FORMATS if name not in RECIPES]),
        (recipe_table(), RECIPES),
    ):
        head, _, *lines = table.splitlines()
        assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(names)
        assert {line.count("|") for line in (head, *lines)} == {head.count("|")}


def test_some_lines() -> None:
    assert "| e4m3fnuz | 8 | 4 | 240 | 2^-7 | 2^-10 | no | yes | no | 31.5 |" in element_table()
    assert "| e8m0 | 8 | 1 | 2^127 | 2^-127 | 2^-127 | no | yes | no |  |" in element_table()
    assert "| nvfp4 | e2m1 | nvfp4 | 4.5 |" in scaled_table()
    assert "| e4m3_row | e4m3 | row_fp32 | the same | nearest | no | all |" in recipe_table()
    assert "| mx | 32 neighbours along the summed axis | e8m0 | up |" in scaling_table()
