"""See SinkCasts."""

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
    2. Casts need no hoisting: they are inserted at the root of every chain of views, where
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
            if _shrinks(cast):
                waiting.extend(_sink(graph, cast))
                changed = True
        return changed


def _shrinks(cast: fx.Node) -> bool:
    views = list(cast.users)
    if not views or not all(is_movement(view) and value_of(view) is not None for view in views):
        return False
    return sum(prod(shape_of(view)) for view in views) < prod(shape_of(cast))


def _sink(graph: fx.Graph, cast: fx.Node) -> list[fx.Node]:
    source, dtype = cast.args[0], cast.args[1]
    assert isinstance(source, fx.Node)
    made = []
    for view in list(cast.users):
        with graph.inserting_before(view):
            wide = graph.create_node(view.op, view.target, (source, *view.args[1:]), view.kwargs)
        wide.meta.update(view.meta)
        refresh(wide)
        below = insert_call(graph, CONVERT, (wide, dtype), after=wide, like=cast)
        facts = facts_of(cast)
        if facts is not None:
            set_facts(below, facts)
        view.replace_all_uses_with(below)
        graph.erase_node(view)
        made.append(below)
    graph.erase_node(cast)
    return made
