"""Memory while many tensors or nodes of graphs come and go."""

import ctypes
import gc
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_MOST = 2**31 - 1
_LARGE = 32 << 20  # where glibc's own adjustment ends once a program has freed tensors as large
_RARELY = (50_000, 20, 100)  # new objects, and rounds, between Python's collections of garbage


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library reuse the memory of freed tensors instead of handing it back.

    glibc maps and unmaps every large block, so each new tensor costs a page fault every 4 KiB,
    as long as an elementwise operation takes itself. Interpreting a graph makes thousands of
    them. Blocks of 32 MiB on are mapped still: freed ones would leave holes that nothing fits.
    Afterwards what is free goes back to the system. Elsewhere than on glibc nothing changes.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_THRESHOLD, _LARGE)
    library.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Have Python look for garbage less often.

    Each full collection walks through all nodes of all graphs: a tenth of the time that tracing a
    model of a hundred layers takes, and more with every layer. Only collections free what refers
    to itself: nodes and formulas do, tensors with contents do not here.
    """
    before = gc.get_threshold()
    if not gc.isenabled() or before[0] >= _RARELY[0]:
        yield
        return
    gc.set_threshold(*_RARELY)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class SpareMemory:
    """Hands memory of freed tensors back where it would make a program larger than it need be.

    What is free lies in pieces between what is in use, and new tensors may fit none of them. That
    much is let be beside the most that was in use; on Linux with glibc only.
    """

    def __init__(self, share: float = 0.17, expected: float = 0.0) -> None:
        """Begin.

        Args:
            share: of the memory in use, bytes over bytes: what may lie idle.
            expected: bytes beside those in use now that the program will need in any case.
        """
        library = _glibc()
        if library:
            library.malloc_trim(0)
        self._share, self._most = share, _bytes_in_use() + expected
        self._beside = max(0, _resident_bytes() - _bytes_in_use())

    def trim(self) -> None:
        """Hand back what is free, if it is too much."""
        self._most = max(self._most, _bytes_in_use())
        library = _glibc()
        if library and _resident_bytes() > self._beside + (1 + self._share) * self._most:
            library.malloc_trim(0)


class _Information(ctypes.Structure):
    """glibc's ``struct mallinfo2``: its last but two is bytes in use, the fifth what is mapped."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def _bytes_in_use() -> int:
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = _Information
    sizes = library.mallinfo2().sizes
    return int(sizes[4] + sizes[7])


def _resident_bytes() -> int:
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * mmap.PAGESIZE if status.exists() else 0
