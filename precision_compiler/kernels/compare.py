"""Whether what a kernel made is what its reference makes."""

from collections.abc import Sequence

import torch

NARROW = (
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
FLIPPED = 0.01
"""Largest share of 8-bit elements that may lie on the neighbouring number."""


def mismatches(
    made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float
) -> list[str]:
    """What differs, in words; empty if nothing does.

    Codes of scales are the same to the bit. Elements of 8 bits may be the neighbouring number
    here and there, as sums in another order move what is rounded by a few units of float32.
    Everything else differs by at most ``tolerance`` times the largest number.
    """
    if len(made) != len(wanted):
        return [f"{len(made)} results instead of {len(wanted)}"]
    found = (
        _mismatch(one.cpu(), other.cpu(), tolerance)
        for one, other in zip(made, wanted, strict=True)
    )
    return [f"result {index}: {words}" for index, words in enumerate(found) if words]


def _mismatch(made: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> str:
    if made.shape != wanted.shape or made.dtype != wanted.dtype:
        return f"{made.dtype} {tuple(made.shape)}, not {wanted.dtype} {tuple(wanted.shape)}"
    if not made.numel():
        return ""
    if made.dtype in NARROW:
        return _steps_apart(made, wanted)
    if not made.dtype.is_floating_point:
        count = int((made != wanted).sum())
        return f"{count} of {made.numel()} codes differ" if count else ""
    finite = wanted.isfinite()
    if not torch.equal(made[~finite].nan_to_num(nan=0.0), wanted[~finite].nan_to_num(nan=0.0)):
        return "infinities and NaN differ"
    one, other = made[finite].double(), wanted[finite].double()
    largest = float((one - other).abs().amax()) if one.numel() else 0.0
    allowed = tolerance * float(other.abs().amax()) if one.numel() else 0.0
    return "" if largest <= allowed else f"differs by {largest:g}, {allowed:g} is allowed"


def _steps_apart(made: torch.Tensor, wanted: torch.Tensor) -> str:
    """The codes of 8-bit floats, less their sign, count the format's numbers from zero up.

    The two zeros, where there are two, are neighbours.
    """
    unknown = wanted.float().isnan()
    if not torch.equal(made.float().isnan(), unknown):
        return "NaN differ"
    apart = (_position(made) - _position(wanted)).abs().masked_fill(unknown, 0)
    furthest, share = int(apart.max()), float((apart > 0).double().mean())
    if furthest > 1:
        return f"elements are up to {furthest} numbers apart"
    return "" if share <= FLIPPED else f"{share:.2%} of the elements are on the next number"


def _position(x: torch.Tensor) -> torch.Tensor:
    zero = 128 if x.dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz) else 127
    codes = x.contiguous().view(torch.uint8).int()
    return torch.where(codes < 128, codes, zero - codes)
