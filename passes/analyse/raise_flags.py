"""See RaiseFlags."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite
from typing import ClassVar

from precision_compiler.errors import InternalError
from precision_compiler.flags import Flag
from precision_compiler.flips import flip_variance
from precision_compiler.formats import CHOICES, Format, relative_variance
from precision_compiler.links import Links
from precision_compiler.observation import update_loss
from precision_compiler.origin import constant_copies
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.scaling import is_stochastic, suits
from precision_compiler.sites import provenance_of
from precision_compiler.statistics import Sensitivity, Statistics
from precision_compiler.target import Target

_INTO_NORMAL_RANGE = 256  # binades that lift every float32 number above any format's smallest
_ALWAYS = ("fp32", "tf32", "bf16", "fp16", "e4m3", "e5m2")  # checked even if no target has them
_WEIGHTS = CHOICES["bf16"]  # what weights would be kept in if not in float32


@dataclass(frozen=True)
class RaiseFlags:
    """Raise a flag for every way the error prediction could be wrong, and veto what must not be.

    First-order analysis of independent errors cannot see an infinity, is wrong where values
    vanish or errors agree, and says nothing where no derivative arrives.

    1. Overflow (veto): the measured amax, ``2**margin`` times as large, exceeds an unscaled
       format's largest finite number.
    2. Underflow (veto): with all values ``2**-drift`` as large, an unscaled format's predicted
       error would be more than ``growth`` times that of values in the normal range: relative
       errors rise below it, and gradients shrink during training.
    3. Flush (veto): more than ``flushed`` of the elements other than zero round to zero.
    4. Coherent: ``|sum h d|`` is more than COHERENT times the root of ``sum h^2 d^2``. The larger
       one is what the site then costs; it is a veto where that is more than ``harmless``.
    5. Invalid (veto): a site alone is predicted to cause an error above ``invalid``.
    6. Silence (veto): a site that no gradient depends on (on this batch) stays float32.
    7. Single element: the prediction is one draw.
    8. Same-sign sum: a reduction of more terms of one sign than a bf16 number has steps; it
       accumulates in float32.
    9. Zero gradient: a parameter whose gradient is float32 noise; no metric counts it.
    10. Accumulation: the target adds products up in a narrow format; a veto where the terms of one
       sign are more than that format has steps, so that sums would stop growing.
    11. Bias (veto): a gradient operand rounded to nearest in so few bits (``unbiased_bits``
       significant ones or less) errs alike from step to step, where the target has a recipe of no
       more bits that rounds it stochastically.
    12. Constants of an ONNX file are the same on every batch: no margin for them, and what their
       rounding costs is known, below the normal range as well: rule 2 leaves them out.
    13. Flips: a node chooses by comparing computed numbers, and errors as large as those of one
       bf16 rounding would flip so many choices of all nodes that the gradient changed by more than
       ``harmless``. Predictions contain it; narrower formats raise it by the root of their errors.
    14. Update swamping: for a given learning rate, the share of bf16 weights that an update of
       that size would leave unchanged.
    """

    margin: int = 1
    drift: int = 4
    growth: float = 2.0
    flushed: float = 0.5
    harmless: float = 0.01
    invalid: float = 0.3
    unbiased_bits: int = 2
    name: ClassVar[str] = "raise-flags"
    reads: ClassVar[frozenset[str]] = frozenset({"statistics"})
    makes: ClassVar[frozenset[str]] = frozenset({"vetoes"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.flags`` and ``unit.vetoes``."""
        if unit.statistics is None:
            raise InternalError("raise-flags ran without statistics")
        constants = constant_copies(unit.joint.module.graph, unit.joint.parameters)
        for site in unit.joint.sites:
            tensors = list(_tensors(unit.statistics, unit.links, site.name, site.kind))
            rules = replace(self, margin=0, growth=inf) if site.node in constants else self
            for name in unit.formats_for(site.kind):
                unit.flags += rules._of_site(site.name, tensors, CHOICES[name])
        for name, seen in unit.statistics.ranges.items():
            for fmt in CHOICES.values():
                if fmt.name in _ALWAYS or fmt.name in unit.target.choices:
                    unit.flags += self._of_range(name, seen, fmt)
        unit.flags += [*_of_sums(unit.statistics), *_of_gradients(unit.statistics)]
        unit.flags += self._of_flips(unit.statistics)
        unit.flags += [*_of_accumulation(unit), *self._of_bias(unit)]
        unit.flags += _of_updates(unit)
        for flag in unit.flags:
            if flag.veto and flag.format is not None:
                unit.vetoes.setdefault((flag.site, flag.format), f"{flag.name}: {flag.sentence}")
        return False

    def _of_flips(self, statistics: Statistics) -> Iterator[Flag]:
        variance = relative_variance(_WEIGHTS)
        if flip_variance(statistics.flip_density, variance) ** 0.5 <= self.harmless:
            return
        for node, density in statistics.flips.items():
            error = flip_variance(density, variance) ** 0.5
            sentence = (
                f"it chooses by computed numbers: errors of {variance**0.5:.2%} in them flip "
                f"choices that change the gradient by {error:.2g} of its size"
            )
            yield Flag("flips", node, None, sentence, {"error": error}, False)

    def _of_bias(self, unit: Unit) -> Iterator[Flag]:
        coarse = [name for name in unit.target.choices if self._is_biased(name)]
        if not coarse:
            return
        nodes = {node.name: node for node in unit.joint.module.graph.nodes}
        provenance = provenance_of(unit.joint.module.graph, unit.joint.parameters)
        for site in unit.links.contractions.values():
            sources = [nodes[link.source] for link in unit.links.reads_of(site.name)]
            if not any(map(provenance.is_gradient, sources)):
                continue
            for name in coarse:
                better = _unbiased(name, site.role, unit.target)
                if better:
                    bits = CHOICES[name].precision
                    sentence = (
                        f"a gradient rounded to nearest with {bits} significant bits errs alike "
                        f"from step to step: {better} has no bias"
                    )
                    yield Flag("bias", site.name, name, sentence, {"bits": float(bits)}, True)

    def _is_biased(self, name: str) -> bool:
        return CHOICES[name].precision <= self.unbiased_bits and not is_stochastic(name)

    def _of_site(self, site: str, tensors: Sequence[Sensitivity], fmt: Format) -> Iterator[Flag]:
        if fmt.name == "fp32" or not tensors:
            return
        if all(tensor.is_silent for tensor in tensors):
            sentence = "no gradient depends on it on this batch"
            yield Flag("silence", site, fmt.name, sentence, {}, True)
        for tensor in tensors:
            yield from self._of_range(site, tensor, fmt)
            yield from self._of_effect(site, tensor, fmt)
        error = sum(tensor.variance(fmt) for tensor in tensors) ** 0.5
        if error > self.invalid:
            sentence = f"predicted to change the gradient by {error:.2g} of its size, alone"
            yield Flag("invalid", site, fmt.name, sentence, {"error": _finite(error)}, True)

    def _of_range(self, site: str, tensor: Sensitivity, fmt: Format) -> Iterator[Flag]:
        """Rules 1 and 3, which need no derivative."""
        if fmt.name == "fp32":
            return
        if not fmt.scaled and tensor.amax * 2.0**self.margin > fmt.max_finite:
            sentence = (
                f"largest magnitude {tensor.amax:.3g} with a margin of {2**self.margin} exceeds "
                f"{fmt.max_finite:g}"
            )
            numbers = {"amax": _finite(tensor.amax), "largest": fmt.max_finite}
            yield Flag("overflow", site, fmt.name, sentence, numbers, True)
        lost = tensor.flushed(fmt)
        if lost > self.flushed:
            sentence = f"{lost:.1%} of its elements other than zero would round to zero"
            yield Flag("flush", site, fmt.name, sentence, {"flushed": lost}, True)

    def _of_effect(self, site: str, tensor: Sensitivity, fmt: Format) -> Iterator[Flag]:
        """Rules 2, 4 and 7."""
        normal = tensor.variance(fmt, drift=_INTO_NORMAL_RANGE)
        drifted = tensor.variance(fmt, drift=-self.drift)
        if not fmt.scaled and drifted > normal * self.growth**2:
            times = (drifted / normal) ** 0.5
            sentence = (
                f"the error would be {times:.1f} times larger than above the smallest normal "
                f"number {2.0**fmt.min_exponent:.3g} if values shrank {2**self.drift} times"
            )
            yield Flag("underflow", site, fmt.name, sentence, {"growth": _finite(times)}, True)
        ratio = tensor.signed_ratio(fmt)
        if tensor.is_coherent(fmt):
            error = tensor.variance(fmt) ** 0.5
            sentence = (
                f"rounding errors add up to {ratio:.1f} times what independent ones would, "
                f"{error:.2g} of the gradient"
            )
            numbers = {"ratio": _finite(ratio), "error": _finite(error)}
            yield Flag("coherent", site, fmt.name, sentence, numbers, error > self.harmless)
        if tensor.size == 1:
            sentence = "it is a single number: its rounding error on another batch is another draw"
            yield Flag("single-element", site, fmt.name, sentence, {}, False)


def _unbiased(name: str, role: str, target: Target) -> str:
    """A recipe of no more bits that rounds gradients stochastically; "" where there is none."""
    recipes = (
        other
        for other in target.choices
        if is_stochastic(other) and suits(other, role)
        if CHOICES[other].bits <= CHOICES[name].bits
    )
    return next(recipes, "")


def _finite(number: float) -> float:
    """A number that JSON knows: infinities and NaN become the largest float32 number."""
    return number if isfinite(number) else CHOICES["fp32"].max_finite


def _of_sums(statistics: Statistics) -> Iterator[Flag]:
    steps = 2.0**_WEIGHTS.precision
    for node, terms in statistics.sums.items():
        if terms > steps:
            sentence = (
                f"about {terms:.0f} terms of one sign: a sum kept in {_WEIGHTS.name} would stop "
                f"growing after {steps:.0f}, so it is kept in fp32"
            )
            yield Flag("same-sign-sum", node, _WEIGHTS.name, sentence, {"terms": terms}, False)


def _of_accumulation(unit: Unit) -> Iterator[Flag]:
    assert unit.statistics is not None
    for (site, name), found in unit.statistics.accumulations.items():
        running = CHOICES[unit.target.rate(name).accumulate]
        error, steps = found.variance**0.5, 2.0**running.precision
        sentence = (
            f"products are added up in {running.name}, which alone changes the gradient by "
            f"{error:.2g} of its size; {found.terms:.0f} terms of one sign, {steps:.0f} steps"
        )
        numbers = {"error": error, "terms": found.terms, "steps": steps}
        yield Flag("accumulation", site, name, sentence, numbers, found.terms > steps)


def _of_gradients(statistics: Statistics) -> Iterator[Flag]:
    for tensor in statistics.tensors:
        if tensor.is_zero:
            sentence = (
                f"its gradient of norm {tensor.norm:.2g} is float32 rounding noise (which is "
                f"{tensor.noise:.2g} here), and left out of every mean over tensors"
            )
            numbers = {"norm": tensor.norm, "noise": tensor.noise}
            yield Flag("zero-gradient", tensor.name, None, sentence, numbers, False)


def _of_updates(unit: Unit) -> Iterator[Flag]:
    if unit.learning_rate is None:
        return
    share = update_loss(unit.joint.parameter_values.values(), unit.learning_rate, _WEIGHTS)
    if share > 0.0:
        sentence = (
            f"at learning rate {unit.learning_rate:g}, {share:.1%} of the weights would not move "
            f"if they were kept in {_WEIGHTS.name}: keep float32 master weights"
        )
        numbers = {"share": share, "learning_rate": unit.learning_rate}
        yield Flag("update-swamping", "", _WEIGHTS.name, sentence, numbers, False)


def _tensors(statistics: Statistics, links: Links, site: str, kind: str) -> Iterator[Sensitivity]:
    if kind == "storage":
        yield statistics.stores[site]
        return
    yield from (statistics.operands[site, link.argument] for link in links.reads_of(site))
    yield from statistics.internals.get(site, ())
