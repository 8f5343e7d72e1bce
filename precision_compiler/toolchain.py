"""What compiling needs outside Python: a C++ compiler and Python's own headers."""

import platform
import subprocess
import sysconfig
from pathlib import Path

from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from precision_compiler.errors import ToolchainError

INSTALL_COMPILER = {
    "Linux": "install one, for example `apt-get install g++` or `dnf install gcc-c++`, "
    "or name yours in the environment variable CXX",
    "Darwin": "install the command line tools with `xcode-select --install`",
    "Windows": "install the Visual Studio build tools with C++ and start from their command prompt",
}
INSTALL_HEADERS = "install them, for example `apt-get install python3-dev`"


def require_toolchain() -> None:
    """Checks that torch.compile can build its CPU kernels here.

    Raises:
        ToolchainError: there is no C++ compiler, or the headers of Python are missing.
    """
    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError, subprocess.SubprocessError) as error:
        advice = INSTALL_COMPILER.get(platform.system(), "install one")
        raise ToolchainError(f"torch.compile finds no C++ compiler: {advice}") from error
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise ToolchainError(f"torch.compile needs Python's headers ({header}): {INSTALL_HEADERS}")
