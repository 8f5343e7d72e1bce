"""Sizes that may be symbolic."""

import torch


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number; of a symbolic one its hint, without pinning it down by a guard."""
    return size if isinstance(size, int) else int(size.node.hint or 1)
