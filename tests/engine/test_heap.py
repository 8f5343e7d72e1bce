"""Freed memory is at hand again inside, and returned after."""

import gc
import platform
import resource
from pathlib import Path

import pytest
import torch

from precision_compiler.heap import SpareMemory, freed_memory_kept, rarely_collected

ELEMENTS = 7 << 20  # 28 MiB: four of them are more than glibc ever keeps by itself
GLIBC = platform.libc_ver()[0] == "glibc"


def page_faults() -> int:
    """Page faults of making large tensors four at a time, freed before the next four."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        _ = [torch.zeros(ELEMENTS) for _ in range(4)]
        del _
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not GLIBC, reason="other C libraries are left alone")
def test_large_tensors_reuse_memory_inside() -> None:
    outside = page_faults()
    with freed_memory_kept():
        inside = page_faults()
    assert inside < outside / 2


@pytest.mark.skipif(not GLIBC, reason="other C libraries are left alone")
def test_what_was_kept_goes_back_to_the_system() -> None:
    before = resident_bytes()
    with freed_memory_kept():
        made = [torch.zeros(ELEMENTS) for _ in range(4)]
        del made
        assert resident_bytes() > before + 3 * 4 * ELEMENTS
    assert resident_bytes() < before + 4 * ELEMENTS


@pytest.mark.skipif(not GLIBC, reason="other C libraries are left alone")
def test_spare_memory_goes_back_where_it_is_more_than_a_share_of_what_was_in_use() -> None:
    with freed_memory_kept():
        generous, strict = SpareMemory(1e3), SpareMemory(0.0)
        made = [torch.zeros(ELEMENTS) for _ in range(4)]
        del made
        kept = resident_bytes()
        generous.trim()
        assert resident_bytes() > kept - ELEMENTS
        strict.trim()
        assert resident_bytes() < kept - 3 * 4 * ELEMENTS


def test_an_error_inside_comes_out() -> None:
    with pytest.raises(ZeroDivisionError), freed_memory_kept():
        1 / 0  # noqa: B018


def test_garbage_collection_is_rarer_inside_and_as_before_after() -> None:
    before = gc.get_threshold()
    with rarely_collected():
        inside = gc.get_threshold()
        with rarely_collected():
            assert gc.get_threshold() == inside
        assert gc.get_threshold() == inside
    assert all(new > old for new, old in zip(inside, before, strict=True))
    assert gc.get_threshold() == before


def test_garbage_collection_thresholds_return_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="inside"), rarely_collected():
        raise ValueError("inside")
    assert gc.get_threshold() == before


def test_a_user_that_turned_collection_off_keeps_it_off() -> None:
    before = gc.get_threshold()
    gc.disable()
    try:
        with rarely_collected():
            assert not gc.isenabled()
            assert gc.get_threshold() == before
    finally:
        gc.enable()
