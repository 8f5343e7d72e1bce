"""How decisions touch: which stored tensor each contraction reads, and which it writes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from precision_compiler.graph import contraction_rule, is_float32, root_of
from precision_compiler.joint import JointGraph
from precision_compiler.sites import Site, output_nodes, rounded_arguments


@dataclass(frozen=True)
class Link:
    """One argument of a contraction.

    Attributes:
        contraction: name of the contraction site.
        argument: position of the argument.
        source: fx name of the node that computed the elements.
        store: name of the storage site they are kept in, None if their format is not decided.
        companion: whether it is a small addend (a bias), which only formats that the operation
            has as a plain dtype ask to be rounded.
    """

    contraction: str
    argument: int
    source: str
    store: str | None
    companion: bool = False


@dataclass(frozen=True)
class Links:
    """All contacts between the sites of one graph.

    Attributes:
        contractions: contraction sites by name.
        stores: storage sites by name.
        reads: one link per rounded argument of every contraction.
        results: for each contraction, the storage sites of its results.
    """

    contractions: Mapping[str, Site]
    stores: Mapping[str, Site]
    reads: tuple[Link, ...]
    results: Mapping[str, tuple[str, ...]]

    @cached_property
    def writer(self) -> Mapping[str, str]:
        """The contraction that writes each storage site, where one does."""
        return {store: name for name, written in self.results.items() for store in written}

    def reads_of(self, contraction: str) -> list[Link]:
        """The links of one contraction."""
        return list(self._by_contraction.get(contraction, ()))

    @cached_property
    def _by_contraction(self) -> Mapping[str, list[Link]]:
        found: dict[str, list[Link]] = {}
        for link in self.reads:
            found.setdefault(link.contraction, []).append(link)
        return found


def find_links(joint: JointGraph) -> Links:
    """Connect the sites of a joint graph."""
    nodes = {node.name: node for node in joint.module.graph.nodes}
    contractions = {site.name: site for site in joint.sites if site.kind == "contraction"}
    stores = {site.name: site for site in joint.sites if site.kind == "storage"}
    by_node = {site.node: site.name for site in stores.values()}
    reads: list[Link] = []
    results: dict[str, tuple[str, ...]] = {}
    for name, site in contractions.items():
        node = nodes[site.node]
        rule = contraction_rule(node)
        companions = rule.companions if rule else ()
        reads += [
            _link(name, index, value, by_node, index in companions)
            for index, value in _floats(node)
        ]
        results[name] = tuple(
            by_node[out.name] for out in output_nodes(node) if out.name in by_node
        )
    return Links(contractions, stores, tuple(reads), results)


def _floats(node: fx.Node) -> list[tuple[int, fx.Node]]:
    return [(index, value) for index, value in rounded_arguments(node).items() if is_float32(value)]


def _link(
    contraction: str, argument: int, value: fx.Node, by_node: Mapping[str, str], companion: bool
) -> Link:
    source = root_of(value).name
    if source not in by_node:  # results of multi-output operations are reached past no view
        source = value.name if value.name in by_node else source
    return Link(contraction, argument, source, by_node.get(source), companion)
