"""Every flag that the package raises says what it means."""

import ast
from pathlib import Path

from precision_compiler.flags import FLAGS

ROOT = Path(__file__).parents[2]


def raised() -> set[str]:
    """First arguments of all calls of Flag."""
    found = set()
    for folder in ("precision_compiler", "passes"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                is_flag = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Flag"
                if is_flag and isinstance(node, ast.Call):
                    assert isinstance(node.args[0], ast.Constant)
                    found.add(str(node.args[0].value))
    return found


def test_flags_that_are_raised_are_those_with_a_meaning() -> None:
    assert raised() == set(FLAGS)


def test_the_page_lists_every_flag_of_a_training_plan() -> None:
    page = (ROOT / "docs" / "error-prediction.md").read_text(encoding="utf-8")
    assert not [name for name in FLAGS if f"| {name} |" not in page]
