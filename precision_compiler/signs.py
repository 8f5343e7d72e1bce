"""Random signs, by which one derivative stands for the derivatives of many numbers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


class Signs(Sequence[torch.Tensor]):
    """Random +-1 for every element of some tensors, times the weight of its tensor.

    Kept as bits; torch's own generators take ten times as long as NumPy's.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], weights: Sequence[float], seed: int
    ) -> None:
        """Draw.

        Args:
            tensors: whose shapes, types and devices the signs get.
            weights: a positive number, or 0, for each.
            seed: of the signs.
        """
        dice = np.random.default_rng(seed)
        self._like = [value.to("meta") for value in tensors]
        self._devices = [value.device for value in tensors]
        self._weights = list(weights)
        self._bits = [
            np.frombuffer(dice.bytes(-(-value.numel() // 8)), dtype=np.uint8) for value in tensors
        ]

    def __len__(self) -> int:
        return len(self._bits)

    def __getitem__(self, index: Any) -> Any:
        like, weight = self._like[index], self._weights[index]
        bits = torch.from_numpy(np.unpackbits(self._bits[index], count=like.numel()))
        row = bits.to(self._devices[index], like.dtype).mul_(2 * weight).sub_(weight)
        return row.reshape(like.shape)
