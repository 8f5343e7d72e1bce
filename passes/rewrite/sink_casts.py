"""See SinkCasts."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import fx

from precision_compiler.facts import facts_of, set_facts
from precision_compiler.graph import CONVERT, insert_call, is_movement, refresh, shape_of, value_of
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.verify import is_ours


@dataclass(frozen=True)
class SinkCasts:
    """Cast only the part of a tensor that is read, where that moves fewer bytes.

    1. A cast that is read through views alone, which together show fewer elements than it casts
       (slices, selections), moves below those views.
    2. So does a cast back to float32 that is read through views alone, of which the narrow tensor
       has the same: what they copy is copied once, in the narrow format.
    3. Casts need no hoisting: they are inserted at the root of every chain of views, where
       broadcasting has not yet multiplied the elements.
    """

    name: ClassVar[str] = "sink-casts"
    reads: ClassVar[frozenset[str]] = frozenset({"casts"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Move casts until none moves fewer bytes elsewhere."""
        graph, changed = unit.joint.module.graph, False
        waiting = [node for node in graph.nodes if is_ours(node)]
        while waiting:
            cast = waiting.pop()
            twins = _twins(cast)
            if twins:
                waiting.extend(_share(graph, cast, twins))
            elif _shrinks(cast):
                waiting.extend(_sink(graph, cast))
            else:
                continue
            changed = True
        return changed


def _views(cast: fx.Node) -> list[fx.Node]:
    """The readers of a cast if all of them are views, else nothing."""
    views = list(cast.users)
    are_views = all(is_movement(view) and value_of(view) is not None for view in views)
    return views if are_views else []


def _elements(views: Iterable[fx.Node]) -> int:
    return sum(prod(shape_of(view)) for view in views)


def _shrinks(cast: fx.Node) -> bool:
    views = _views(cast)
    return bool(views) and _elements(views) < prod(shape_of(cast))


def _twins(cast: fx.Node) -> dict[fx.Node, fx.Node]:
    """Rule 2: the same view of the narrow tensor for every view of a cast; empty if one lacks."""
    source, views = cast.args[0], _views(cast)
    assert isinstance(source, fx.Node)
    narrow, wide = value_of(source), value_of(cast)
    if narrow is None or wide is None or narrow.itemsize >= wide.itemsize:
        return {}
    known = {_view_key(user): user for user in source.users if is_movement(user)}
    twins = {view: known[_view_key(view)] for view in views if _view_key(view) in known}
    return twins if len(twins) == len(views) and _elements(views) <= prod(shape_of(cast)) else {}


def _view_key(view: fx.Node) -> str:
    return f"{view.target} {view.args[1:]} {view.kwargs}"


def _share(graph: fx.Graph, cast: fx.Node, twins: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Read the narrow tensor's views, each cast to float32, in place of the cast's."""
    for view, twin in twins.items():
        if view < twin:
            view.prepend(twin)
            # Computed where the view was: what the forward pass reads is not left to the backward.
            twin.meta = {**view.meta, "val": twin.meta["val"]}
    return _replace(graph, cast, twins)


def _replace(graph: fx.Graph, cast: fx.Node, narrow: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """Put casts of ``narrow`` nodes in the place of a cast's views; return these casts."""
    made = []
    for view, source in narrow.items():
        below = insert_call(graph, CONVERT, (source, cast.args[1]), after=source, like=cast)
        facts = facts_of(cast)
        if facts is not None:
            set_facts(below, facts)
        view.replace_all_uses_with(below)
        graph.erase_node(view)
        made.append(below)
    graph.erase_node(cast)
    return made


def _sink(graph: fx.Graph, cast: fx.Node) -> list[fx.Node]:
    source = cast.args[0]
    assert isinstance(source, fx.Node)
    above = {}
    for view in cast.users:
        with graph.inserting_before(view):
            wide = graph.create_node(view.op, view.target, (source, *view.args[1:]), view.kwargs)
        wide.meta.update(view.meta)
        refresh(wide)
        above[view] = wide
    return _replace(graph, cast, above)
