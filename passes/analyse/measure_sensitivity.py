"""See MeasureSensitivity."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import ClassVar

import torch

from precision_compiler.accumulation import Accumulator
from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError, InternalError
from precision_compiler.flips import NearBoundaries, compared
from precision_compiler.float32_noise import euclidean_norm, with_float32_noise
from precision_compiler.formats import CHOICES
from precision_compiler.heap import freed_memory_kept, rarely_collected
from precision_compiler.joint import JointGraph
from precision_compiler.links import find_links
from precision_compiler.noise import GradientSums, Noise, batch_noise, noise_of_parts
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.probe import Probe
from precision_compiler.signs import Signs
from precision_compiler.statistics import METRICS, Statistics, TensorGradient, averaged
from precision_compiler.tape import Tape

_INVISIBLE = 1e-5  # of an objective: what errors of 100 % do not change by more, counts nowhere
_FLOOR = 1e-4  # of the mean square gradient: what a tensor's error is compared with at the least


@dataclass(frozen=True)
class MeasureSensitivity:
    """Measure how much a rounding anywhere would disturb the gradients and the loss.

    The joint graph G(x) = (loss, gradients) is interpreted with real values under autograd. With
    one random vector v of +-1 over all gradient elements, s = <v, gradients> is differentiated
    with respect to every stored tensor and every contraction argument at once (a double backward).
    For an error d in a tensor with derivative h = ds/dy, E_v[(h.d)^2] = ||J d||^2, so rounding
    errors that are independent with variance ulp^2/12 disturb the gradients by a squared norm of
    sum h^2 ulp^2 / 12. That sum is kept as a histogram over binades, from which any format is
    priced later without running the model again.

    1. A storage site's tensor gets the derivative of everything that reads it.
    2. A contraction's argument gets the derivative of that reading alone; readers of one tensor
       share one rounded copy, so the products of their derivatives are kept too.
    3. Fused attention is replaced by a formula that can be differentiated twice; what the kernel
       rounds inside (probabilities, their gradients) is measured as internal to the site.
    4. Four objectives: all gradients together; each parameter tensor's gradient relative to
       itself (v divided by its norm, structurally zero gradients left out); the loss; and numbers
       near boundaries where comparisons choose by them, such as the backward pass of ReLU, for
       errors flip those choices (``precision_compiler.flips``).
    5. For formats with a scale, single and equal elements and the test for coherent errors, tensors
       are really rounded.
    6. A stored tensor that comes out on the format's grid once its sources are on it (they are
       only moved, negated, selected, scaled by powers of two) is rounded once, not twice.
    7. Where the target adds products up in a narrow format, the partial sums of some results of
       every matrix product give its error.
    8. The gradient's noise between mini-batches is estimated where the budget depends on it.
    9. In an inference graph the outputs take the place of the gradients; there is no loss.
    10. What these derivatives multiply may be rounded to bf16 or tf32 where the hardware is
       faster then: they are needed to a few per cent. Values are computed in float32.
    11. Derivatives that reach a maximum or another selection are followed further only if errors
       of 100 % there would count: softmax subtracts maxima that do not matter.
    12. Parameters with small gradients are asked whether float32 decides them.
    13. Several batches are averaged. Parts of the graph whose intermediate values autograd cannot
       keep within the unit's memory are run twice. If it says nothing, they may take as much as
       AdamW's moments, which training takes anyway; in an inference graph all are run twice.

    Attributes:
        seed: of the signs v and of random operations.
        tensors: whether to predict each parameter tensor's error too (the second objective),
            which costs half as much again; of a finished plan it is measured in any case.
    """

    seed: int = 0
    tensors: bool = False
    name: ClassVar[str] = "measure-sensitivity"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"statistics"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.statistics``."""
        if unit.captured is None:
            raise InternalError("analysis needs the captured graph with its inputs")
        formats = [CHOICES[name] for name in unit.target.choices if name not in ("fp32", "tf32")]
        memory = _moments(unit.joint) if unit.memory is None else unit.memory
        accumulators = {
            name: Accumulator(CHOICES[rate.accumulate], rate.accumulate_every)
            for name in unit.target.choices
            if (rate := unit.target.rate(name)).accumulate != "fp32"
        }
        found: list[Statistics] = []
        sums = GradientSums()
        for index, captured in enumerate((unit.captured, *unit.calibration)):
            same = captured.joint.module is unit.captured.joint.module
            links = unit.links if same else find_links(captured.joint)
            noise = [tensor.noise for tensor in found[0].tensors] if found else None
            with freed_memory_kept(), rarely_collected():
                probe = Probe(captured.joint, links, formats, accumulators)
                seed, asked = self.seed + index, probe.comparing
                tape = Tape(captured, probe, memory, seed, roughly=True, asked=asked)
                summed = sums if unit.calibration and unit.budget.needs_noise else None
                found.append(self._probed(tape, probe, self.seed + index, noise, summed))
        mean = averaged(found)
        wanted = unit.budget.needs_noise
        unit.statistics = _with_noise(mean, sums, unit.captured) if wanted else mean
        return False

    def _probed(
        self,
        tape: Tape,
        probe: Probe,
        seed: int,
        noise: list[float] | None,
        sums: GradientSums | None,
    ) -> Statistics:
        """One batch, whose gradients are added to the sums; with float32's noise once known."""
        with torch.random.fork_rng():
            loss, gradients = tape.record()
            tensors = _tensors(tape, gradients, noise)
            norm = sum(tensor.norm**2 for tensor in tensors) ** 0.5
            if not (isfinite(norm) and norm > 0):
                raise AnalysisError(_useless(norm, tape.captured.joint.inference))
            if sums is not None:
                sums.add(gradients)
            if noise is None:
                tensors = with_float32_noise(tape, tensors, gradients)
            probes: dict[str, Sequence[torch.Tensor]] = {
                "gradient": Signs(gradients, [1 / norm] * len(tensors), seed)
            }
            if not tape.captured.joint.inference:
                probes["loss"] = []
            if self.tensors:
                probes["tensor"] = Signs(gradients, _tensor_weights(tensors), seed + 1)
            del gradients  # the tape lets go of them one by one
            known = dict(pair for found in probe.choices.values() for pair in found)
            others = {"compared": [source for node in known for source in compared(node)]}
            choices = [(node, one) for node, one in known.items() for _ in compared(node)]
            if choices:
                probes["compared"] = NearBoundaries(choices, probe.densities, seed + 2)
            turn = partial(_turn_to, probe, abs(float(loss)))
            tape.differentiate(probes, turn, probe.finish, others)
            probe.finish_rest()
        return probe.statistics(norm, float(loss), tensors)


def _moments(joint: JointGraph) -> float:
    """Bytes of AdamW's two moments of all parameters; 0 for a graph that nobody trains."""
    if joint.inference:
        return 0.0
    return 2.0 * sum(value.nbytes for value in joint.parameter_values.values())


def _useless(norm: float, inference: bool) -> str:
    if inference:
        return f"the norm of the outputs on this batch is {norm}: pass one with finite outputs"
    return (
        f"the gradient norm on this batch is {norm}: pass a batch with a finite loss that depends "
        "on the parameters"
    )


def _turn_to(probe: Probe, loss: float, objective: str) -> None:
    probe.metric = METRICS.index(objective)
    probe.least = _INVISIBLE * (loss if objective == "loss" else 1.0)


def _tensor_weights(tensors: Sequence[TensorGradient]) -> list[float]:
    """Weights that make the probe's variance the mean square of the tensors' relative errors.

    A tensor's error is taken relative to its gradient or, where that is larger, to a floor of
    ``_FLOOR`` of the mean square gradient, and structurally zero gradients have no part.
    """
    total = sum(tensor.norm**2 for tensor in tensors)
    elements = sum(tensor.elements for tensor in tensors)
    counted = sum(not tensor.is_zero for tensor in tensors) or 1
    floors = [_FLOOR * total * tensor.elements / elements for tensor in tensors]
    return [
        0.0 if tensor.is_zero else (counted * (tensor.norm**2 + floor)) ** -0.5
        for tensor, floor in zip(tensors, floors, strict=True)
    ]


def _tensors(
    tape: Tape, gradients: Sequence[torch.Tensor], noise: list[float] | None
) -> tuple[TensorGradient, ...]:
    """The parameters' gradients, with float32's noise in them where it is known."""
    known = noise or [0.0] * len(gradients)
    names, sizes = tape.captured.joint.goal_names, [value.numel() for value in gradients]
    return tuple(map(TensorGradient, names, map(euclidean_norm, gradients), known, sizes))


def _with_noise(found: Statistics, sums: GradientSums, captured: Captured) -> Statistics:
    if sums.count > 1:
        noise = batch_noise(sums)
    elif captured.gradients is None:
        noise = Noise(None, "the model is not at hand to run parts of the batch")
    else:
        noise = noise_of_parts(captured.batch, captured.gradients, found.gradient_norm)
    relative = None if noise.deviation is None else noise.deviation / found.gradient_norm
    return replace(found, noise=relative, noise_origin=noise.origin)
