"""Delayed scaling: a tensor's scale from its largest magnitudes in the steps before."""

import torch
from torch import nn

from precision_compiler.elements import FORMATS, Format
from precision_compiler.errors import FormatError
from precision_compiler.rounding import round_to


class DelayedScaling(nn.Module):
    """History and scale of one tensor, both in the ``state_dict``.

    A step rounds under the present scale and records its largest magnitude; the scale of the next
    step is ``max_finite / (2^margin * largest of the last window steps)``, and 1 in the first. It
    stays as it is while the history holds nothing but zeros, or an infinity or NaN, and is at most
    the largest float32 number. Rules and defaults are those of Transformer Engine's
    ``DelayedScaling`` recipe (transformer_engine/pytorch/quantization.py, _default_sf_compute),
    with ``amax_compute_algo="max"``.

    Attributes:
        history: largest magnitudes, float32, shape (window,), the latest step's first.
        scale: what numbers are multiplied by before they are rounded, a single float32 number.
    """

    history: torch.Tensor
    scale: torch.Tensor

    def __init__(self, fmt: Format, window: int = 1024, margin: int = 0) -> None:
        """An empty history.

        Args:
            fmt: format of the elements.
            window: steps that the history holds.
            margin: binary orders of magnitude that are kept free above the largest magnitude.

        Raises:
            FormatError: the window has no step in it.
        """
        if window < 1:
            raise FormatError(f"a window of {window} steps has no amax in it: choose 1 or more")
        super().__init__()
        self.fmt, self.margin = fmt, margin
        self.register_buffer("history", torch.zeros(window))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round float32 ``x`` under the present scale, saturating, then record its amax."""
        made = round_to(x * self.scale, self.fmt, saturate=True) * self.scale.reciprocal()
        self.update(x.detach().abs().amax() if x.numel() else x.new_zeros(()))
        return made

    @torch.no_grad()
    def update(self, amax: torch.Tensor) -> None:
        """Put a step's largest magnitude (a single number) into the history and set the scale."""
        self.history.copy_(self.history.roll(1))
        self.history[0] = amax
        largest = self.history.amax()
        scale = torch.div(largest.new_tensor(self.fmt.max_finite), largest) / 2.0**self.margin
        scale = scale.clamp(max=FORMATS["fp32"].max_finite)
        known = (largest > 0) & largest.isfinite()
        self.scale.copy_(torch.where(known, scale, self.scale))

    def extra_repr(self) -> str:
        """What ``print`` shows: format, window and margin."""
        return f"{self.fmt.name}, window={len(self.history)}, margin={self.margin}"
