"""Formats that matrix units multiply, by width; more than the planner chooses from."""

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from types import MappingProxyType

from precision_compiler.formats import CHOICES

GEMM_BYTES: Mapping[str, float] = MappingProxyType(
    {name: row.bits / 8 for name, row in CHOICES.items()} | {"int8": 1.0}
)
"""Bytes of one element, scales of blocks not counted (OCP Microscaling v1.0; NVIDIA NVFP4)."""


def nearest(word: str, words: Collection[str]) -> str:
    """The end of an error message: the word that was probably meant, and those there are."""
    close = get_close_matches(word, words, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"{guess}; choose one of {', '.join(words)}"
