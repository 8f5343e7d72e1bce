"""One interface for every pass, the check of their order, and the runner."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from math import inf, prod
from typing import ClassVar, Protocol

from torch import fx

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured
from precision_compiler.errors import InternalError, OrderError, PrecisionError
from precision_compiler.flags import Flag
from precision_compiler.fusion import Kernel
from precision_compiler.graph import root_of, shape_of, value_of
from precision_compiler.joint import JointGraph
from precision_compiler.journal import Journal, JournalEntry
from precision_compiler.links import Links, find_links
from precision_compiler.overrides import resolved
from precision_compiler.problem import Prices, Problem, Saved, Solution, Table, fixes_result
from precision_compiler.statistics import Statistics
from precision_compiler.target import Target
from precision_compiler.verify import result_dtypes, verify_graph

Progress = Callable[[str], None]


def silent(_message: str) -> None:
    """Progress that nobody asked for."""


class Numerics(Enum):
    """What a pass may do to results."""

    EXACT = "bit for bit the same result"
    CHANGES = "may round differently, within the plan's error budget"


@dataclass
class Unit:
    """What passes work on: one graph and everything known about it so far.

    Attributes:
        joint: the graph, rewritten in place by the passes of the later stages.
        machine: the target; None where an assignment is carried out for one that is not known.
        budget: the allowed error; its limit is set once the baseline is scored.
        journal: what happened so far.
        captured: the graph before any rewriting with its objective, for analysis.
        calibration: further batches of the same model, to average over.
        statistics: what calibration measured.
        learning_rate: of the training, if it is known.
        memory: bytes the analysis may keep of what autograd saves; None: as many as AdamW's
            moments take.
        most_bytes: limit on what a step keeps from the forward to the backward pass.
        overrides: formats that the user insists on, by glob over site names.
        flags: what may go wrong.
        vetoes: why a (site or node, format) is ruled out.
        raised: factors on predicted variances that verification asked for, by site and format.
        slope: of what flipped choices cause, as in ``Problem``.
        kernels: what the graph compiles to.
        contraction_prices, store_prices, cast_prices, fixed_seconds: as in ``Prices``.
        baseline: torch.autocast's policy as an assignment.
        solution: the chosen assignment and its proof.
        assignment: format by site name; what the rewriting stage carries out.
        architecture: of the GPU that the graph is lowered for, such as "sm_90"; empty if unknown.
    """

    joint: JointGraph
    machine: Target | None
    budget: Budget
    journal: Journal
    captured: Captured | None = None
    calibration: tuple[Captured, ...] = ()
    statistics: Statistics | None = None
    learning_rate: float | None = None
    memory: float | None = None
    most_bytes: float = inf
    overrides: Mapping[str, str] = field(default_factory=dict)
    flags: list[Flag] = field(default_factory=list)
    vetoes: dict[tuple[str, str], str] = field(default_factory=dict)
    raised: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    slope: float = 0.0
    kernels: tuple[Kernel, ...] = ()
    fixed_seconds: float = 0.0
    contraction_prices: Table = field(default_factory=dict)
    store_prices: Table = field(default_factory=dict)
    cast_prices: Table = field(default_factory=dict)
    baseline: dict[str, str] = field(default_factory=dict)
    solution: Solution | None = None
    assignment: dict[str, str] = field(default_factory=dict)
    architecture: str = ""

    @property
    def target(self) -> Target:
        """The machine the plan is for."""
        if self.machine is None:
            raise InternalError("a pass of the rewriting stage asks for the target")
        return self.machine

    @cached_property
    def links(self) -> Links:
        """How the sites of the captured graph touch."""
        return find_links(self.joint)

    @cached_property
    def insisted(self) -> Mapping[str, tuple[str, str]]:
        """Pattern and format of every site that an override is about.

        Raises:
            PlanError: see ``overrides.resolved``.
        """
        kinds = {kind: self.formats_for(kind) for kind in ("contraction", "storage")}
        return resolved(self.overrides, self.joint.sites, kinds)

    @cached_property
    def problem(self) -> Problem:
        """The decision problem; to be asked for once statistics, vetoes and prices are there."""
        if self.statistics is None:
            raise InternalError("the problem is posed before the statistics are measured")
        options = {
            site.name: tuple(
                name for name in self.formats_for(site.kind) if (site.name, name) not in self.vetoes
            )
            for site in self.joint.sites
        }
        options |= {site: (fmt,) for site, (_, fmt) in self.insisted.items()}
        prices = Prices(
            self.contraction_prices, self.store_prices, self.cast_prices, self.fixed_seconds
        )
        return Problem(
            self.links,
            options,
            prices,
            self.statistics,
            self.raised,
            self._saved(),
            self.most_bytes,
            self.slope,
        )

    def expect_flips(self, slope: float) -> None:
        """Pose the problem anew with another slope of what flipped choices cause, if any are."""
        if slope and slope != self.slope:
            self.slope = slope
            self.__dict__.pop("problem", None)

    def _saved(self) -> Saved:
        if self.joint.inference:
            return Saved({}, frozenset(), 0.0)
        nodes = {node.name: node for node in self.joint.module.graph.nodes}
        stores = {site.node: name for name, site in self.links.stores.items()}
        roots = {root_of(nodes[name]) for name in self.joint.saved if name in nodes}
        read = {name for kernel in self.kernels if kernel.backward for name in kernel.reads}
        shown = {root_of(nodes[name]).name for name in read if name in nodes}
        others = (root for root in roots if root.name not in stores)
        return Saved(
            {stores[root.name]: prod(shape_of(root)) for root in roots if root.name in stores},
            frozenset(stores[name] for name in shown if name in stores),
            sum(self._bytes(root) for root in others if root.name not in self.joint.parameters),
        )

    @staticmethod
    def _bytes(node: fx.Node) -> float:
        value = value_of(node)
        return 0.0 if value is None else float(prod(shape_of(node)) * value.element_size())

    def to_rewrite(self, joint: JointGraph, solution: Solution) -> "Unit":
        """A unit with the same findings that carries out a solution on a graph of its own."""
        twin = replace(
            self, joint=joint, solution=solution, assignment=dict(solution.assignment),
            journal=self.journal.copy(), architecture=self.target.architecture,
        )  # fmt: skip
        found = ("links", "problem", "insisted")  # in the graph as captured
        twin.__dict__.update({name: getattr(self, name) for name in found})
        return twin

    def raise_predictions(self, factors: Mapping[tuple[str, str], float]) -> None:
        """Multiply predicted variances, by (site, format); the problem is posed anew."""
        raised = {site: dict(known) for site, known in self.raised.items()}
        for (site, name), factor in factors.items():
            known = raised.setdefault(site, {})
            known[name] = known.get(name, 1.0) * factor
        self.raised = raised
        self.__dict__.pop("problem", None)

    def formats_for(self, kind: str) -> tuple[str, ...]:
        """Formats to consider for a kind of site on this target."""
        known = self.target.choices
        if kind == "contraction":
            return tuple(known)
        return tuple(name for name in known if fixes_result(name))


class Pass(Protocol):
    """One step. A frozen dataclass: its fields are its options, its docstring its rule list."""

    name: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    makes: ClassVar[frozenset[str]]
    spoils: ClassVar[frozenset[str]]
    numerics: ClassVar[Numerics]

    def run(self, unit: Unit) -> bool:
        """Edit the unit in place; return True if the graph changed."""
        ...


class Pipeline:
    """Runs passes in the given order, with the checks and the bookkeeping around each."""

    def __init__(self, passes: Sequence[Pass], given: frozenset[str] = frozenset()) -> None:
        """Check the order.

        Args:
            passes: in the order they run.
            given: kinds of fact that are there before the first pass.

        Raises:
            OrderError: a pass reads what no earlier pass makes, or what one has spoiled.
        """
        fresh = set(given)
        for step in passes:
            missing = sorted(step.reads - fresh)
            if missing:
                raise OrderError(f"{step.name} reads {missing}, which no earlier pass makes")
            fresh = (fresh - step.spoils) | step.makes
        self.passes = tuple(passes)

    def run(self, unit: Unit, progress: Progress = silent) -> None:
        """Run every pass on ``unit``; after each change clean, lint and verify the graph."""
        module, stale = unit.joint.module, False
        results = result_dtypes(module.graph)
        for step in self.passes:
            progress(_first_line(step))
            before, start = len(module.graph.nodes), time.perf_counter()
            changed = self._run_one(step, unit)
            if changed:
                module.graph.eliminate_dead_code()
                module.graph.lint()
                verify_graph(module.graph, step.name, results)
                stale = True
            elapsed = time.perf_counter() - start
            after = len(module.graph.nodes)
            unit.journal.add(JournalEntry(step.name, _first_line(step), elapsed, before, after))
        if stale:  # once: code for thousands of nodes takes as long as a pass
            module.recompile()

    def _run_one(self, step: Pass, unit: Unit) -> bool:
        try:
            return step.run(unit)
        except (PrecisionError, InternalError) as error:
            error.add_note(f"in pass {step.name}")
            raise


def _first_line(step: Pass) -> str:
    return (type(step).__doc__ or step.name).strip().splitlines()[0].rstrip(".")
