"""Write files so that nothing is lost."""

import os
import secrets
from pathlib import Path

from precision_compiler.errors import PlanError


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file through a temporary one beside it; text is written as UTF-8."""
    written = content.encode() if isinstance(content, str) else content
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    try:
        with temporary.open("xb") as stream:
            stream.write(written)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_record(path: str | os.PathLike[str], kind: str) -> bytes:
    """The bytes of a file.

    Args:
        path: the file.
        kind: what it holds, such as "plan", for the error.

    Raises:
        PlanError: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise PlanError(f"cannot read the {kind} {path}: {error.strerror}") from error


def write_record(path: str | os.PathLike[str], content: str | bytes, kind: str) -> None:
    """Write a file whole or not at all; arguments as of ``read_record``.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        write_atomically(Path(path), content)
    except OSError as error:
        raise PlanError(f"cannot write the {kind} {path}: {error.strerror}") from error
