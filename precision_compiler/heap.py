"""Keep freed memory at hand while many large tensors come and go."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of glibc's mallopt(3)
_MOST = 2**31 - 1
_LARGE = 32 << 20  # where glibc's own adjustment ends once a program has freed tensors as large


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


class _Information(ctypes.Structure):
    """glibc's ``struct mallinfo2``; its last fields are bytes in use, free, and on top."""

    _fields_ = (("sizes", ctypes.c_size_t * 10),)


def spare_memory_returned(share: float) -> None:
    """Give memory of freed tensors back to the system, if it is much beside what is in use.

    Args:
        share: of the memory in use, bytes over bytes: up to that much stays at hand.
    """
    library = _glibc()
    if library is None or not hasattr(library, "mallinfo2"):
        return
    library.mallinfo2.restype = _Information
    *_, used, free, _ = library.mallinfo2().sizes
    if free > share * used:
        library.malloc_trim(0)
