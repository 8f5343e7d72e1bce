"""The README keeps its promises: two commands up front, and code that runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from precision_compiler.cli import main

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
FIRST_SCREEN = 40
COMMANDS = ("pip install '.[test]' && pytest", "precision-compiler demo")


def blocks(language: str) -> list[str]:
    """Contents of the README's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("command", COMMANDS)
def test_first_screen_holds_the_command(command: str) -> None:
    top = README.read_text("utf-8").splitlines()[:FIRST_SCREEN]
    assert any(command in line for line in top)


@pytest.mark.slow
def test_python_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_every_command_in_it_is_one_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("(?:bash|sh|console)"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["precision-compiler"]:
                with pytest.raises(SystemExit, match="0"):
                    main([words[1], "--help"])
    capsys.readouterr()


def test_links_to_files_resolve() -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", README.read_text("utf-8"))
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
