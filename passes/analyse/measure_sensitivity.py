"""See MeasureSensitivity."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler.attention import substitutes
from precision_compiler.capture import Captured
from precision_compiler.errors import AnalysisError, InternalError
from precision_compiler.graph import CONVERT
from precision_compiler.links import Links
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.replay import Replay, execute
from precision_compiler.sites import rounded_arguments
from precision_compiler.statistics import Sensitivity, Statistics, insensitive, weight_of


@dataclass(frozen=True)
class MeasureSensitivity:
    """Measure how much a rounding anywhere would disturb the gradients.

    The joint graph G(x) = (loss, gradients) is interpreted with real values under autograd. With
    one random vector v of +-1 over all gradient elements, s = <v, gradients> is differentiated
    with respect to every stored tensor and every contraction argument at once (a double backward).
    For an error d in a tensor with derivative h = ds/dy, E_v[(h.d)^2] = ||J d||^2, so rounding
    errors that are independent with variance ulp^2/12 disturb the gradients by a squared norm of
    sum h^2 ulp^2 / 12. That sum is kept as a histogram over binades, from which any format is
    priced later without running the model again.

    1. A storage site's tensor gets the derivative of everything that reads it.
    2. A contraction's argument gets the derivative of that reading alone.
    3. Fused attention is replaced by a formula that can be differentiated twice; what the kernel
       rounds inside (probabilities, their gradients) is measured as internal to the site.
    """

    seed: int = 0
    name: ClassVar[str] = "measure-sensitivity"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"statistics"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.statistics``."""
        if unit.captured is None:
            raise InternalError("analysis needs the captured graph with its inputs")
        probe = _Probe(unit.captured, unit.links)
        with torch.enable_grad():
            unit.statistics = probe.measure(self.seed)
        return False


class _Probe:
    """One interpreted run with a hook on everything that could be rounded."""

    def __init__(self, captured: Captured, links: Links) -> None:
        self.captured, self.links = captured, links
        self.stores = {site.node: site.name for site in links.stores.values()}
        self.contractions = {site.node: site.name for site in links.contractions.values()}
        self.formulas = substitutes()
        self.found_stores: dict[str, Sensitivity] = {}
        self.found_operands: dict[tuple[str, int], Sensitivity] = {}
        self.found_internals: dict[str, list[Sensitivity]] = {}
        self.constants: list[torch.Tensor] = []  # depend on no input, yet gradients depend on them

    def measure(self, seed: int) -> Statistics:
        """Run forward, backward and the double backward."""
        joint = self.captured.joint
        leaves = [_leaf(value) for value in joint.inputs]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            replay = Replay(joint.module, leaves, joint.outputs, self._run)
            results = replay.forward()
            loss = self.captured.objective(lambda: results)
            wanted = replay.tangents_needed(results)
            tangents = torch.autograd.grad(
                loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True
            )
            gradients = [value for value in replay.backward(tangents) if value is not None]
        norm = (
            float(sum(gradient.detach().double().square().sum() for gradient in gradients)) ** 0.5
        )
        if not (isfinite(norm) and norm > 0):
            raise AnalysisError(
                f"the gradient norm on this batch is {norm}: pass a batch with a finite loss that "
                "depends on the parameters"
            )
        self._differentiate(gradients, leaves, seed)
        return Statistics(
            self.found_stores,
            self.found_operands,
            {name: tuple(found) for name, found in self.found_internals.items()},
            norm,
            float(loss.detach()),
        )

    def _differentiate(self, gradients: list[torch.Tensor], leaves: list[Any], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = [
            torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
            for value in gradients
        ]
        floats = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        live = [
            (value, sign)
            for value, sign in zip(gradients, signs, strict=True)
            if value.requires_grad
        ]
        if live:
            torch.autograd.grad(
                [value for value, _ in live],
                floats + self.constants,
                [sign for _, sign in live],
                allow_unused=True,
            )

    def _run(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        site = self.contractions.get(node.name)
        if site is not None:
            args = self._tapped_arguments(node, site, args)
        if node.target in self.formulas:
            taps = self.found_internals.setdefault(site or node.name, [])
            value = self.formulas[node.target](_internal_tap(taps), *args, **kwargs)
        elif node.target is CONVERT:
            value = args[0].to(args[1])  # the primitive itself has no derivative
        else:
            value = execute(node, args, kwargs)
        store = self.stores.get(node.name)
        if store is not None:
            self._watch(value, partial(self.found_stores.__setitem__, store))
        return value

    def _tapped_arguments(self, node: fx.Node, site: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tapped = list(args)
        for index in rounded_arguments(node):
            if isinstance(args[index], torch.Tensor):
                edge = args[index].view_as(args[index])
                self._watch(edge, partial(self.found_operands.__setitem__, (site, index)))
                tapped[index] = edge
        return tuple(tapped)

    def _watch(self, value: torch.Tensor, keep: Callable[[Sensitivity], None]) -> None:
        if not value.requires_grad:
            self.constants.append(value.requires_grad_())
        _watch(value, keep)


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value


def _watch(value: torch.Tensor, keep: Callable[[Sensitivity], None]) -> None:
    """Bin the tensor when its derivative arrives; without one it disturbs nothing."""
    still = value.detach()
    unmoved = insensitive(still)
    keep(unmoved)

    def arrived(adjoint: torch.Tensor | None) -> None:
        if adjoint is not None:  # autograd has no tensor for some derivatives that are zero
            keep(Sensitivity(weight_of(still, adjoint), unmoved.amax))

    if value.requires_grad:
        value.register_hook(arrived)  # type: ignore[no-untyped-call]


def _internal_tap(found: list[Sensitivity]) -> Callable[[torch.Tensor], torch.Tensor]:
    def tap(value: torch.Tensor) -> torch.Tensor:
        edge = value.view_as(value)
        found.append(insensitive(edge))
        _watch(edge, partial(found.__setitem__, len(found) - 1))
        return edge

    return tap
