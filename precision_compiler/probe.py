"""Hooks on everything that could be rounded, while a tape runs a graph and its derivatives."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from precision_compiler.accumulation import (
    RESULTS,
    Accumulator,
    partial_sum_variance,
    products,
    same_sign_terms,
)
from precision_compiler.attention import substitutes
from precision_compiler.exactness import cone_of, is_exact
from precision_compiler.facts import facts_of
from precision_compiler.formats import Format, quantised
from precision_compiler.graph import (
    CONVERT,
    base_name,
    contraction_rule,
    is_float32,
    is_matrix_product,
    is_movement,
)
from precision_compiler.links import Links
from precision_compiler.observation import (
    GLANCE,
    Observation,
    binades,
    binned,
    insensitive,
    sampled,
)
from precision_compiler.replay import execute
from precision_compiler.scaling import reason_against_recipe
from precision_compiler.sites import provenance_of
from precision_compiler.statistics import (
    METRICS,
    Accumulated,
    Correlation,
    Edge,
    Sensitivity,
    Statistics,
    TensorGradient,
    unweighted,
)
from precision_compiler.tape import Chunk, Values

_SUMS = ("sum", "mean", "var_mean")

_Place = fx.Node | tuple[str, int]
"""Where a tensor is: the node that computed it, or inside a site, by number."""


@dataclass
class _Watched:
    """One tensor whose derivatives are awaited: in total (key "store") and reader by reader."""

    value: torch.Tensor
    gradient: dict[str | Edge, torch.Tensor] = field(default_factory=dict)
    others: dict[tuple[str | Edge, int], np.ndarray] = field(default_factory=dict)
    exponents: torch.Tensor | None = None

    def take(self, key: str | Edge, metric: int, adjoint: torch.Tensor) -> None:
        """Keep a sample of a gradient derivative; of others, which no pairs are made of, bins."""
        row = sampled(adjoint)
        if metric == 0:
            self.gradient[key] = row.clone() if row.data_ptr() == adjoint.data_ptr() else row
            return
        if self.exponents is None:
            self.exponents = binades(sampled(self.value))
        scale = self.value.numel() / max(1, row.numel())
        self.others[key, metric] = binned(self.exponents, row.double().square_()) * scale


@dataclass(frozen=True)
class _Summed:
    """Variances of some results by format, where they are in a sample, and their terms."""

    rows: torch.Tensor
    variances: Mapping[str, torch.Tensor]
    terms: float


class Probe:
    """Runs single nodes for a tape and collects a ``Sensitivity`` of everything watched.

    Attributes:
        stores, operands, internals, correlations, exact, ranges, accumulations, sums: as in
            ``Statistics``.
        metric: row of METRICS that arriving derivatives belong to.
    """

    def __init__(
        self,
        graph: fx.Graph,
        links: Links,
        formats: Sequence[Format],
        accumulators: Mapping[str, Accumulator] | None = None,
        parameters: frozenset[str] = frozenset(),
    ) -> None:
        """Prepare the hooks.

        Args:
            graph: the joint graph.
            links: its sites and how they touch.
            formats: formats that tensors are really rounded to.
            accumulators: formats whose contractions the target does not add up in float32.
            parameters: names of the placeholders that are parameters.
        """
        self._links, self._provenance = links, provenance_of(graph, parameters)
        self.formats = [fmt for fmt in formats if not fmt.by_axis]
        self.metric = 0
        self._blocks = [fmt for fmt in formats if fmt.by_axis]
        self._block_errors: dict[Edge, dict[str, torch.Tensor]] = {}
        self._accumulators = accumulators or {}
        self._summed: dict[fx.Node, _Summed] = {}
        nodes = {node.name: node for node in graph.nodes}
        self._stored = {nodes[site.node]: name for name, site in links.stores.items()}
        self._sites = {nodes[site.node]: name for name, site in links.contractions.items()}
        self._readings: dict[fx.Node, dict[int, list[fx.Node]]] = {}
        for link in links.reads:
            site = nodes[links.contractions[link.contraction].node]
            argument = site.args[link.argument]
            assert isinstance(argument, fx.Node)
            chain = _chain(argument, nodes[link.source])
            self._readings.setdefault(site, {})[link.argument] = chain
        self._cones = {node: cone for node in self._stored if (cone := cone_of(node, self._stored))}
        self._formulas = substitutes()
        self._watched: dict[_Place, _Watched] = {}
        self._constants: list[torch.Tensor] = []
        self._seen: dict[_Place, Sensitivity] = {}
        self.stores: dict[str, Sensitivity] = {}
        self.operands: dict[Edge, Sensitivity] = {}
        self.internals: dict[tuple[str, int], Sensitivity] = {}
        self.correlations: list[Correlation] = []
        self.exact: dict[str, tuple[str, ...]] = {}
        self.ranges: dict[str, Sensitivity] = {}
        self.accumulations: dict[tuple[str, str], Accumulated] = {}
        self.sums: dict[str, float] = {}

    def reads(self, node: fx.Node) -> Iterable[fx.Node]:
        """Arguments; for what is tapped or tested for exactness, the tensors behind them."""
        found = dict.fromkeys(node.all_input_nodes)
        for root, *views in self._readings.get(node, {}).values():
            found[root] = None
            sizes = (source for view in views for source in view.all_input_nodes)
            found.update((size, None) for size in sizes if size is not root and size not in views)
        found.update(dict.fromkeys(self._cones.get(node, ())))
        return found

    def run(self, node: fx.Node, values: Values) -> Any:
        """The value of a node, with taps on what it reads and on its result."""
        args: Any = fx.node.map_arg(node.args, values)
        kwargs: Any = fx.node.map_arg(node.kwargs, values)
        site = self._sites.get(node)
        if site is not None:
            args = self._tapped(node, site, args, values)
        if node.target in self._formulas:
            tap = partial(self._tap_inside, site or node.name, itertools.count())
            value = self._formulas[node.target](tap, *args, **kwargs)
        elif node.target is CONVERT:
            value = args[0].to(args[1])  # the primitive itself has no derivative
        else:
            value = execute(node, args, kwargs)
        if node not in self._seen:
            self._look(node, value, args, values)
            if site is not None and self._accumulators:
                self._add_up(node, value, args)
        if node in self._stored and torch.is_grad_enabled():
            self._watch(node, value, "store", value)
        return value

    def constants(self) -> list[torch.Tensor]:
        """Watched tensors that depend on no input, though gradients depend on them."""
        found, self._constants = self._constants, []
        return found

    def finish(self, chunk: Chunk) -> None:
        """Turn the derivatives of what a chunk computed into sensitivities."""
        for node in chunk.nodes:
            self._settle(node)
        for place in [place for place in self._watched if isinstance(place, tuple)]:
            self._settle(place)
        for seen in self._watched.values():
            seen.exponents = None

    def finish_rest(self) -> None:
        """The same for inputs and parameters; what no derivative reached is silent."""
        for node in list(self._watched):
            self._settle(node)
        for node, name in self._stored.items():
            self.stores.setdefault(name, self._seen[node])
        for site, readings in self._readings.items():
            for index, chain in readings.items():
                edge = self._sites[site], index
                if edge not in self.operands:
                    seen = self._seen.get(chain[0])
                    self.operands[edge] = seen or Sensitivity(unweighted(), 0.0)

    def statistics(
        self, norm: float, loss: float, tensors: tuple[TensorGradient, ...]
    ) -> Statistics:
        """All that was collected."""
        inside: dict[str, list[Sensitivity]] = {}
        for site, index in sorted(self.internals):
            inside.setdefault(site, []).append(self.internals[site, index])
        return Statistics(
            self.stores,
            self.operands,
            {site: tuple(found) for site, found in inside.items()},
            tuple(self.correlations),
            self.exact,
            self.ranges,
            self.accumulations,
            self.sums,
            norm,
            loss,
            tensors,
        )

    def _tapped(
        self, node: fx.Node, site: str, args: tuple[Any, ...], values: Values
    ) -> tuple[Any, ...]:
        """Arguments read through a tap of their own on the tensor that holds their elements."""
        tapped = list(args)
        for index, chain in self._readings.get(node, {}).items():
            root, *views = chain
            value = values(root)
            if root not in self._seen:
                self._seen[root] = insensitive(value, GLANCE)
            if (site, index) not in self._block_errors and is_matrix_product(node):
                self._block_errors[site, index] = self._in_blocks(node, index, chain, values)
            if not torch.is_grad_enabled():
                continue
            edge = value.view_as(value)
            self._watch(root, edge, (site, index), value)
            tapped[index] = _shown(edge, root, views, values)
        return tuple(tapped)

    def _in_blocks(
        self, node: fx.Node, index: int, chain: Sequence[fx.Node], values: Values
    ) -> dict[str, torch.Tensor]:
        """Errors of rounding an operand with scales along the sum, where its root is sampled."""
        rule, (root, *views) = contraction_rule(node), chain
        if not self._blocks or rule is None or index not in rule.operands:
            return {}
        with torch.enable_grad():
            leaf = values(root).detach().requires_grad_()
            operand = _shown(leaf, root, views, values)
        still, axis, found = operand.detach(), -1 if index == rule.operands[0] else -2, {}
        role = self._links.contractions[self._sites[node]].role
        content = self._provenance.content(root)
        for fmt in self._blocks:
            if reason_against_recipe(fmt.name, role, still.shape[axis]):
                continue
            dice = torch.Generator(still.device).manual_seed(len(self._block_errors))
            error = quantised(still, fmt, None, axis, content, dice) - still
            # The derivative of a view puts its elements back where they lie in the root.
            (moved,) = torch.autograd.grad(operand, leaf, error, retain_graph=True)
            found[fmt.name] = sampled(moved).clone()
        return found

    def _tap_inside(self, site: str, counter: Iterator[int], value: torch.Tensor) -> torch.Tensor:
        place = site, next(counter)
        if place not in self._seen:
            self._seen[place] = seen = insensitive(value, GLANCE)
            self.internals[place] = seen
        if not torch.is_grad_enabled():
            return value
        edge = value.view_as(value)
        self._watch(place, edge, "store", value)
        return edge

    def _watch(
        self, place: _Place, value: torch.Tensor, key: str | Edge, still: torch.Tensor
    ) -> None:
        if not value.requires_grad:
            self._constants.append(value.requires_grad_())
        kept = still.detach()

        def arrived(adjoint: torch.Tensor | None) -> None:
            if adjoint is not None:  # autograd has no tensor for some derivatives that are zero
                seen = self._watched.setdefault(place, _Watched(kept))
                seen.take(key, self.metric, adjoint)

        value.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _settle(self, place: _Place) -> None:
        seen = self._watched.pop(place, None)
        if seen is None:
            return
        observed = Observation(seen.value, self.formats)
        for key in dict.fromkeys([*seen.gradient, *(key for key, _ in seen.others)]):
            errors = self._block_errors.get(key, {}) if isinstance(key, tuple) else {}
            found = _sensitivity(observed, seen, key, errors)
            if isinstance(key, tuple):
                self.operands[key] = found
            elif isinstance(place, tuple):
                self.internals[place] = found
            else:
                self.stores[self._stored[place]] = found
        if isinstance(place, fx.Node) and place in self._summed and "store" in seen.gradient:
            self._weigh_sums(place, observed, seen.gradient["store"])
        edges = [key for key in seen.gradient if isinstance(key, tuple)]
        for first, second in itertools.combinations(edges, 2):
            pair = seen.gradient[first], seen.gradient[second]
            self.correlations.append(_correlation(observed, first, second, *pair))

    def _add_up(self, node: fx.Node, value: Any, args: tuple[Any, ...]) -> None:
        """Partial sums of some results of a matrix product, in every narrow running sum."""
        rule = contraction_rule(node)
        operands = [args[index].detach() for index in rule.operands] if rule else []
        if len(operands) != 2 or operands[0].dim() != operands[1].dim() or operands[0].dim() > 3:
            return  # attention and convolutions
        shown = sampled(torch.arange(value.numel(), device=value.device).view(value.shape))
        rows = torch.arange(0, len(shown), -(-len(shown) // RESULTS), device=value.device)
        terms = products(operands[0], operands[1], shown[rows], tuple(value.shape))
        found = {name: partial_sum_variance(terms, how) for name, how in self._accumulators.items()}
        self._summed[node] = _Summed(rows, found, same_sign_terms(terms))

    def _weigh_sums(self, node: fx.Node, observed: Observation, adjoint: torch.Tensor) -> None:
        summed = self._summed[node]
        squares = adjoint[summed.rows].double().square()
        for name, variances in summed.variances.items():
            effect = float((squares * variances).mean()) * observed.size
            self.accumulations[self._sites[node], name] = Accumulated(effect, summed.terms)

    def _look(self, node: fx.Node, value: Any, args: tuple[Any, ...], values: Values) -> None:
        """What the first run shows: ranges, sums of one sign, exact roundings."""
        if not is_float32(node) or not isinstance(value, torch.Tensor) or is_movement(node):
            return
        self._seen[node] = seen = insensitive(value, GLANCE)
        facts = facts_of(node)
        if facts is not None and node not in self._stored:
            self.ranges[facts.name] = seen
        if facts is not None and base_name(node.target) in _SUMS:
            ratio = _same_sign(args[0], value)
            if ratio is not None:
                self.sums[facts.name] = ratio
        sources = self._cones.get(node, ())
        if sources and is_exact(value, [values(source) for source in sources]):
            self.exact[self._stored[node]] = tuple(self._stored[source] for source in sources)


def _chain(argument: fx.Node, root: fx.Node) -> list[fx.Node]:
    """The root and the views through which an argument shows its elements."""
    chain = [argument]
    while chain[-1] is not root:
        parent = chain[-1].args[0]
        assert isinstance(parent, fx.Node)
        chain.append(parent)
    return chain[::-1]


def _shown(
    edge: torch.Tensor, root: fx.Node, views: Sequence[fx.Node], values: Values
) -> torch.Tensor:
    """The same views of another tensor."""
    shown: dict[fx.Node, Any] = {root: edge}

    def read(node: fx.Node) -> Any:
        return shown[node] if node in shown else values(node)

    for view in views:
        args, kwargs = fx.node.map_arg(view.args, read), fx.node.map_arg(view.kwargs, read)
        shown[view] = execute(view, args, kwargs)
    found = shown[views[-1]] if views else edge
    assert isinstance(found, torch.Tensor)
    return found


def _sensitivity(
    observed: Observation,
    seen: _Watched,
    key: str | Edge,
    errors: Mapping[str, torch.Tensor],
) -> Sensitivity:
    weight = unweighted()
    row = seen.gradient.get(key)
    measured: Mapping[str, Any] = {}
    if row is not None:
        weight[0], measured = observed.weight(row), observed.measured(row, errors)
    for metric in range(1, len(METRICS)):
        weight[metric] = seen.others.get((key, metric), 0.0)
    return Sensitivity(weight, observed.amax, observed.count, observed.size, measured)


def _correlation(
    observed: Observation, first: Edge, second: Edge, one: torch.Tensor, other: torch.Tensor
) -> Correlation:
    both = one.double() * other
    measured = {
        fmt.name: float((both * observed.errors[fmt.name].double().square()).sum()) * observed.scale
        for fmt in observed.formats
        if fmt.scaled
    }
    return Correlation(
        first, second, binned(observed.exponents, both) * observed.scale, measured, observed.amax
    )


def _same_sign(terms: Any, total: torch.Tensor) -> float | None:
    """``n |mean| / rms``, root mean square over the sums: terms that pull the same way."""
    if not isinstance(terms, torch.Tensor) or not terms.is_floating_point() or not total.numel():
        return None
    count = terms.numel() / total.numel()
    row = sampled(terms).double()
    rms, mean = float(row.square().mean()) ** 0.5, abs(float(row.mean()))
    return count * mean / rms if rms else None
