"""See VetoRanges."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from precision_compiler.errors import InternalError
from precision_compiler.formats import FORMATS, Format
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.statistics import Sensitivity, Statistics

_INTO_NORMAL_RANGE = 256  # binades that lift every float32 number above any format's smallest


@dataclass(frozen=True)
class VetoRanges:
    """Rule out formats whose range a tensor leaves or would leave soon.

    First-order noise analysis cannot see an infinity, is wrong below the normal range and says
    nothing where no gradient arrives, so these are vetoes, not prices.

    1. Overflow: an unscaled format is out where the measured amax, ``2**margin`` times as large,
       exceeds its largest finite number.
    2. Underflow: an unscaled format is out where, with all values ``2**-margin`` as large, the
       predicted error would be more than ``growth`` times that of values in the normal range:
       relative errors rise below it, and gradients shrink during training.
    3. Silence: a site that no gradient depends on (on this batch) stays float32; what its
       rounding would do cannot be predicted.
    """

    margin: int = 4
    growth: float = 2.0
    name: ClassVar[str] = "veto-ranges"
    reads: ClassVar[frozenset[str]] = frozenset({"statistics"})
    makes: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.vetoes``."""
        if unit.statistics is None:
            raise InternalError("veto-ranges ran without statistics")
        for site in unit.joint.sites:
            tensors = list(_tensors(unit.statistics, site.name, site.kind))
            for name in unit.formats_for(site.kind):
                reason = self._reason(tensors, FORMATS[name])
                if reason:
                    unit.vetoes[site.name, name] = reason
        return False

    def _reason(self, tensors: list[Sensitivity], fmt: Format) -> str | None:
        if fmt.name == "fp32":
            return None
        if not any(tensor.weight.any() for tensor in tensors):
            return "silence: no gradient depends on it on this batch"
        refusals = (self._refusal(tensor, fmt) for tensor in tensors if not fmt.scaled)
        return next((found for found in refusals if found), None)

    def _refusal(self, tensor: Sensitivity, fmt: Format) -> str | None:
        if tensor.amax * 2.0**self.margin > fmt.max_finite:
            return (
                f"overflow: largest magnitude {tensor.amax:.3g} with a margin of "
                f"{2**self.margin} exceeds {fmt.max_finite:g}"
            )
        normal = tensor.variance(fmt, drift=_INTO_NORMAL_RANGE)
        drifted = tensor.variance(fmt, drift=-self.margin)
        if drifted > normal * self.growth**2:
            return (
                f"underflow: the error would be {(drifted / normal) ** 0.5:.1f} times larger than "
                f"above the smallest normal number {2.0**fmt.min_exponent:.3g} if values shrank "
                f"{2**self.margin} times"
            )
        return None


def _tensors(statistics: Statistics, site: str, kind: str) -> Iterator[Sensitivity]:
    if kind == "storage":
        yield statistics.stores[site]
        return
    yield from (found for (name, _), found in statistics.operands.items() if name == site)
