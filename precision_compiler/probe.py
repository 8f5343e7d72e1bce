"""Hooks on everything that could be rounded, while a tape runs a graph and its derivatives."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import fx

from precision_compiler.accumulation import Accumulator
from precision_compiler.adjoints import gated, is_float
from precision_compiler.attention import substitutes
from precision_compiler.chunks import Chunk
from precision_compiler.exactness import cone_of
from precision_compiler.facts import facts_of
from precision_compiler.flips import Choice, choice, compared, deciding
from precision_compiler.formats import Format, quantised
from precision_compiler.graph import (
    CONVERT,
    contraction_rule,
    is_float32,
    is_matrix_product,
    is_movement,
)
from precision_compiler.joint import JointGraph
from precision_compiler.links import Links
from precision_compiler.observation import Observation, how_many
from precision_compiler.operand_errors import OperandErrors
from precision_compiler.reductions import selects
from precision_compiler.replay import execute
from precision_compiler.running_sums import Summed, one_way_terms, summed
from precision_compiler.sampling import GLANCE, sampled, sampled_places
from precision_compiler.scaling import SCALED_FORMATS, reason_against_recipe
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
from precision_compiler.tape import Values
from precision_compiler.watched import Key, Watched

_KEPT = torch.bfloat16  # squares of rounding errors are needed to a per cent

_Place = fx.Node | tuple[str, int]
"""Where a tensor is: the node that computed it, or inside a site, by number."""


class Probe:
    """Runs single nodes for a tape and collects a ``Sensitivity`` of everything watched.

    Attributes:
        stores, operands, internals, correlations, exact, ranges, accumulations, sums: as in
            ``Statistics``.
        choices: of every node that chooses by numbers: the comparisons, and what they choose.
        metric: row of METRICS that arriving derivatives belong to.
        least: by how much something has to change that objective in order to count.
    """

    def __init__(
        self,
        joint: JointGraph,
        links: Links,
        formats: Sequence[Format],
        accumulators: Mapping[str, Accumulator] | None = None,
    ) -> None:
        """Prepare the hooks.

        Args:
            joint: the graph.
            links: its sites and how they touch.
            formats: formats that tensors are really rounded to.
            accumulators: formats whose contractions the target does not add up in float32.
        """
        graph = joint.module.graph
        self._links, self._provenance = links, provenance_of(graph, joint.parameters)
        self.formats = [fmt for fmt in formats if not fmt.by_axis]
        self.metric, self.least = 0, 0.0
        self._blocks = sorted((fmt for fmt in formats if fmt.by_axis), key=_block_size)
        self._block_errors: dict[Edge, dict[str, torch.Tensor]] = {}
        self._accumulators = accumulators or {}
        self._summed: dict[fx.Node, Summed] = {}
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
        self._deciding = deciding(graph)
        self._selecting = {node for node in graph.nodes if selects(node)}
        self._formulas = substitutes()
        self._watched: dict[_Place, Watched] = {}
        self._constants: list[torch.Tensor] = []
        self._seen: dict[_Place, Sensitivity] = {}
        self._most: dict[_Place, int] = {}
        self.stores: dict[str, Sensitivity] = {}
        self.operands: dict[Edge, Sensitivity] = {}
        self.internals: dict[tuple[str, int], Sensitivity] = {}
        self.correlations: list[Correlation] = []
        self.exact: dict[str, tuple[str, ...]] = {}
        self.ranges: dict[str, Sensitivity] = {}
        self.accumulations: dict[tuple[str, str], Accumulated] = {}
        self.sums: dict[str, float] = {}
        self._effects: dict[fx.Node, torch.Tensor] = {}
        self.choices: dict[fx.Node, list[tuple[fx.Node, Choice]]] = {}

    def reads(self, node: fx.Node) -> Iterable[fx.Node]:
        """Arguments; for what is tapped or tested for exactness, the tensors behind them."""
        found = dict.fromkeys(node.all_input_nodes)
        for root, *views in self._readings.get(node, {}).values():
            found[root] = None
            sizes = (source for view in views for source in view.all_input_nodes)
            found.update((size, None) for size in sizes if size is not root and size not in views)
        cone = self._cones.get(node)
        found.update(dict.fromkeys(cone.reads if cone else ()))
        for comparison in self._deciding.get(node, ()):
            found.update(dict.fromkeys([*comparison.all_input_nodes, *compared(comparison)]))
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
        if torch.is_grad_enabled() and is_float(value) and value.requires_grad:
            value = gated(value, lambda: self.least) if node in self._selecting else value
        if node not in self._seen:
            self._look(node, value, args, values)
            if site is not None and self._accumulators:
                partial_sums = summed(node, value, args, self._accumulators)
                self._summed |= {} if partial_sums is None else {node: partial_sums}
        if node in self._deciding:
            self._look_at_choices(node, value, args, values)
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
            seen.forget()

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
            flips={_name(node): density for node, density in self.densities().items()},
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
                self._glance(root, value)
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
        """Errors of rounding an operand with scales along the sum, at every second sampled element.

        They are kept until derivatives arrive, which would be the most memory after autograd's.
        """
        rule, (root, *views) = contraction_rule(node), chain
        if not self._blocks or rule is None or index not in rule.operands:
            return {}
        leaf = values(root).detach()
        still = _shown(leaf, root, views, values)
        axis, found = -1 if index == rule.operands[0] else -2, {}
        role = self._links.contractions[self._sites[node]].role
        content = self._provenance.content(root)
        most = self._most[root]
        every = 2 if leaf.numel() > most else 1
        places = sampled_places(leaf, still, most, every)
        few = None if places is None else OperandErrors(still, places, axis, content)
        for fmt in self._blocks:
            if reason_against_recipe(fmt.name, role, still.shape[axis]):
                continue
            dice, how = torch.Generator(still.device), SCALED_FORMATS[fmt.name]
            dice.manual_seed(len(self._block_errors))
            if few is not None and not how.rotated:
                found[fmt.name] = few.of(how, dice).to(_KEPT)
                continue
            error = quantised(still, fmt, None, axis, content, dice) - still
            with torch.enable_grad():
                moving = leaf.detach().requires_grad_()
                operand = _shown(moving, root, views, values)
            # The derivative of a view puts its elements back where they lie in the root.
            (moved,) = torch.autograd.grad(operand, moving, error)
            found[fmt.name] = sampled(moved, most)[::every].to(_KEPT)
        return found

    def _tap_inside(self, site: str, counter: Iterator[int], value: torch.Tensor) -> torch.Tensor:
        place = site, next(counter)
        if place not in self._seen:
            self.internals[place] = self._glance(place, value)
        if not torch.is_grad_enabled():
            return value
        edge = value.view_as(value)
        self._watch(place, edge, "store", value)
        return edge

    @property
    def comparing(self) -> list[fx.Node]:
        """Tensors of numbers that choose by where they lie."""
        comparisons = itertools.chain.from_iterable(self._deciding.values())
        return list(dict.fromkeys(itertools.chain.from_iterable(map(compared, comparisons))))

    def _look_at_choices(
        self, node: fx.Node, value: torch.Tensor, args: tuple[Any, ...], values: Values
    ) -> None:
        if node not in self.choices:
            self.choices[node] = list(self._chosen(node, args, values))
        if torch.is_grad_enabled() and value.requires_grad:
            value.register_hook(partial(self._choices_count, node))  # type: ignore[no-untyped-call]

    def _chosen(
        self, node: fx.Node, args: tuple[Any, ...], values: Values
    ) -> Iterator[tuple[fx.Node, Choice]]:
        for comparison in self._deciding[node]:
            sides: Any = fx.node.map_arg(comparison.args, values)
            found = choice(args, sides)
            if found is not None:
                yield comparison, found

    def _choices_count(self, node: fx.Node, adjoint: torch.Tensor | None) -> None:
        if adjoint is None or METRICS[self.metric] != "gradient":
            return
        for comparison, one in self.choices[node]:
            effects, known = one.effects(adjoint), self._effects.get(comparison)
            self._effects[comparison] = effects if known is None else known + effects

    def densities(self) -> dict[fx.Node, float]:
        """Of choices, by comparison, as far as derivatives have arrived."""
        known = dict(pair for found in self.choices.values() for pair in found)
        return {node: known[node].density(effects) for node, effects in self._effects.items()}

    def _watch(self, place: _Place, value: torch.Tensor, key: Key, still: torch.Tensor) -> None:
        if not value.requires_grad:
            self._constants.append(value.requires_grad_())
        kept = still.detach()

        def arrived(adjoint: torch.Tensor | None) -> None:
            if adjoint is not None:  # autograd has no tensor for some derivatives that are zero
                if place not in self._watched:
                    amax, most = self._seen[place].amax, self._most[place]
                    self._watched[place] = Watched(kept, amax, most)
                self._watched[place].take(key, self.metric, adjoint)

        value.register_hook(arrived)  # type: ignore[no-untyped-call]

    def _settle(self, place: _Place) -> None:
        seen = self._watched.pop(place, None)
        if seen is None:
            return
        observed = seen.observed(self.formats)
        for key in seen.readers:
            errors = self._block_errors.get(key, {}) if isinstance(key, tuple) else {}
            found = seen.sensitivity(observed, key, errors)
            if isinstance(key, tuple):
                self.operands[key] = found
            elif isinstance(place, tuple):
                self.internals[place] = found
            else:
                self.stores[self._stored[place]] = found
        self.correlations.extend(seen.correlations(observed))
        if isinstance(place, fx.Node) and place in self._summed and "store" in seen.gradient:
            weighed = self._summed[place].weighed(seen.gradient["store"], observed.size)
            self.accumulations.update(
                ((self._sites[place], name), found) for name, found in weighed.items()
            )

    def _glance(self, place: _Place, value: torch.Tensor) -> Sensitivity:
        seen = Observation(value, most=GLANCE)
        self._most[place] = how_many(seen.row)
        self._seen[place] = found = seen.insensitive
        return found

    def _look(self, node: fx.Node, value: Any, args: tuple[Any, ...], values: Values) -> None:
        """What the first run shows: ranges, sums of one sign, exact roundings."""
        if not is_float32(node) or not isinstance(value, torch.Tensor) or is_movement(node):
            return
        seen = self._glance(node, value)
        facts = facts_of(node)
        if facts is not None and node not in self._stored:
            self.ranges[facts.name] = seen
        terms = one_way_terms(node, args, value) if facts is not None else None
        if facts is not None and terms is not None:
            self.sums[facts.name] = terms
        cone = self._cones.get(node)
        if cone is not None and cone.is_exact(value, values):
            self.exact[self._stored[node]] = tuple(self._stored[one] for one in cone.sources)


def _name(node: fx.Node) -> str:
    facts = facts_of(node)
    return node.name if facts is None else facts.name


def _block_size(fmt: Format) -> float:
    """Elements along the sum that share a scale: from small blocks, larger ones are made."""
    return SCALED_FORMATS[fmt.name].scaling.size or inf


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
