"""What is said when the compiler or the headers are missing."""

from pathlib import Path

import pytest
from torch._inductor.exc import InvalidCxxCompiler

from precision_compiler import toolchain
from precision_compiler.errors import ToolchainError


def test_a_working_toolchain_passes() -> None:
    toolchain.require_toolchain()


@pytest.mark.parametrize(("system", "advice"), [("Linux", "g++"), ("Darwin", "xcode-select")])
def test_missing_compiler_says_what_to_install(
    system: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(toolchain, "get_cpp_compiler", no_compiler)
    monkeypatch.setattr("platform.system", lambda: system)
    with pytest.raises(ToolchainError) as caught:
        toolchain.require_toolchain()
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_headers_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(ToolchainError, match="python3-dev"):
        toolchain.require_toolchain()
