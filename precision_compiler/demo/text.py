"""Real text that every Python carries: the manual pages behind `help()`."""

from collections.abc import Iterator
from pydoc_data.topics import topics

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

BLOCK = 8192
HELD_OUT_EVERY = 10


class Corpus:
    """Windows of text for training, and others that training never sees.

    The text is cut into blocks of 8 KiB; every tenth block is held out. A window lies in blocks
    of one kind only.
    """

    def __init__(self, batch_size: int, length: int) -> None:
        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._batch_size = batch_size
        self._length = length
        starts = torch.arange(len(text) - length)
        held_out = (starts // BLOCK) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        # A window is shorter than a block, so its two ends tell which blocks it lies in.
        ends = starts + length
        end_held_out = (ends // BLOCK) % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        self._training = starts[~held_out & ~end_held_out]
        self._held_out = starts[held_out & end_held_out]

    def __len__(self) -> int:
        """Bytes of text."""
        return len(self._text)

    def training_batches(self, seed: int) -> Iterator[Batch]:
        """Random windows for ever, the same ones for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            picks = torch.randint(len(self._training), (self._batch_size,), generator=generator)
            yield self._batch(self._training[picks])

    def held_out_batches(self, count: int) -> list[Batch]:
        """Windows spread evenly over the held-out blocks."""
        picks = torch.linspace(0, len(self._held_out) - 1, count * self._batch_size).long()
        return [self._batch(starts) for starts in self._held_out[picks].chunk(count)]

    def _batch(self, starts: Tensor) -> Batch:
        windows = self._text[starts[:, None] + torch.arange(self._length + 1)]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
