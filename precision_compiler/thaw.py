"""Put a decision problem into a plan, and take it out again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf

import numpy as np

from precision_compiler.errors import PlanError
from precision_compiler.formats import Format
from precision_compiler.links import Link, Links
from precision_compiler.overrides import OVERRIDE
from precision_compiler.paper import borrowed
from precision_compiler.plan import Plan
from precision_compiler.problem import Prices, Problem, Saved
from precision_compiler.sites import Site
from precision_compiler.statistics import Correlation, Statistics
from precision_compiler.tables import Reading, Tables, Together


@dataclass(frozen=True)
class _Known(Correlation):
    """A correlation of which the covariances are all that is left."""

    covariances: Mapping[str, float] = field(default_factory=dict)

    def covariance(self, fmt: Format) -> float:
        """The covariance, as it was written down."""
        return self.covariances.get(fmt.name, 0.0)


def tables_of(problem: Problem, baseline: Mapping[str, str]) -> Tables:
    """The tables of a problem, corrections by verification included.

    Args:
        problem: as it was solved.
        baseline: autocast's policy as an assignment.
    """
    links = problem.links
    position = {(link.contraction, link.argument): at for at, link in enumerate(links.reads)}
    readings = tuple(
        Reading(
            link.contraction, link.argument, link.source, link.store, link.companion,
            {fmt: problem.link_variance(link, fmt) for fmt in _priced(problem, link.contraction)},
        )
        for link in links.reads
    )  # fmt: skip
    pairs = tuple(
        Together(
            position[pair.first],
            position[pair.second],
            {
                fmt: problem.pair_variance(first, second, pair, fmt) / 2
                for fmt in _priced(problem, first.contraction)
            },
        )
        for first, second, pair in problem.pairs
    )
    variances = {
        name: {fmt: problem.store_variance(name, fmt) for fmt in _priced(problem, name)}
        for name in links.stores
    }
    variances |= {
        name: {fmt: problem.internal_variance(name, fmt) for fmt in _priced(problem, name)}
        for name in links.contractions
    }
    nodes = {name: site.node for name, site in (links.contractions | links.stores).items()}  # type: ignore[operator]
    prices = problem.prices
    exact = {name: tuple(found) for name, found in problem.statistics.exact.items()}
    return Tables(
        nodes, readings, dict(links.results), dict(prices.casts), prices.fixed, variances, pairs,
        exact, dict(baseline), dict(problem.saved.elements), problem.saved.other,
        problem.most_bytes if problem.most_bytes < inf else None,
    )  # fmt: skip


def _priced(problem: Problem, site: str) -> Mapping[str, float]:
    stored = site in problem.links.stores
    return (problem.prices.stores if stored else problem.prices.contractions)[site]


def problem_of(plan: Plan) -> Problem:
    """The decision problem of a plan, with its vetoes, as it was last solved.

    Raises:
        PlanError: the plan carries none, or it does not fit the plan's sites.
    """
    tables = plan.tables
    if tables is None:
        raise PlanError("the plan does not say what it was decided on: make it again")
    try:
        return _problem(plan, tables)
    except (KeyError, IndexError) as error:
        raise PlanError(f"the plan's tables do not fit its sites: {error} is missing") from error


def _problem(plan: Plan, tables: Tables) -> Problem:
    sites = {
        name: Site(name, one.kind, one.role, one.op, tables.nodes[name], one.signature, one.shape)
        for name, one in plan.sites.items()
    }
    contractions = {name: site for name, site in sites.items() if site.kind == "contraction"}
    stores = {name: site for name, site in sites.items() if site.kind == "storage"}
    reads = tuple(
        Link(one.contraction, one.argument, one.source, one.store, one.companion)
        for one in tables.readings
    )
    times = {
        name: {fmt: option.seconds for fmt, option in one.options.items()}
        for name, one in plan.sites.items()
    }
    prices = Prices(
        {name: times[name] for name in contractions},
        {name: times[name] for name in stores},
        {source: tables.casts[source] for source in tables.casts},
        tables.fixed_seconds,
    )
    options = {
        name: (one.format,)
        if one.reason.startswith(OVERRIDE)
        else tuple(fmt for fmt, option in one.options.items() if option.veto is None)
        for name, one in plan.sites.items()
    }
    links = Links(contractions, stores, reads, tables.results)
    saved = Saved(tables.kept_elements, frozenset(), tables.kept_bytes)
    most = inf if tables.most_bytes is None else tables.most_bytes
    return Problem(links, options, prices, _statistics(tables, links), saved=saved, most_bytes=most)


def _statistics(tables: Tables, links: Links) -> Statistics:
    def edge(at: int) -> tuple[str, int]:
        return tables.readings[at].contraction, tables.readings[at].argument

    nothing = np.zeros(0)
    return Statistics(
        stores={name: borrowed(tables.variances[name]) for name in links.stores},
        operands={
            (one.contraction, one.argument): borrowed(one.variances) for one in tables.readings
        },
        internals={name: (borrowed(tables.variances[name]),) for name in links.contractions},
        correlations=tuple(
            _Known(edge(pair.first), edge(pair.second), nothing, {}, 0.0, pair.covariances)
            for pair in tables.pairs
        ),
        exact=tables.exact,
    )
