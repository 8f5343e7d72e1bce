"""Keep freed memory at hand while many large tensors come and go."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # names of glibc's mallopt(3)
_MOST = 2**31 - 1
_LARGE = 32 << 20  # where glibc's own adjustment ends once a program has freed tensors as large


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let the C library reuse the memory of freed tensors instead of handing it back.

    glibc maps and unmaps every large block, so each new tensor costs a page fault every 4 KiB,
    as long as an elementwise operation takes itself. Interpreting a graph makes thousands of
    them. Afterwards what is free goes back to the system and glibc maps blocks of 32 MiB on, as
    it comes to do by itself. Elsewhere than on glibc nothing changes.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _MOST)
    try:
        yield
    finally:
        library.mallopt(_MMAP_MAX, 1 << 16)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, 2 * _LARGE)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return library if hasattr(library, "gnu_get_libc_version") else None
