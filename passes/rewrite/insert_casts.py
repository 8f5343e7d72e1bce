"""See InsertCasts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.facts import NodeFacts, facts_of, set_facts, update_facts
from precision_compiler.formats import CHOICES
from precision_compiler.graph import (
    CONVERT,
    Mover,
    contraction_rule,
    insert_call,
    is_float32,
    is_movement,
    refresh,
    uses_past_movement,
    value_of,
    with_movement,
)
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import entry_format, fixes_result
from precision_compiler.sites import named_nodes, output_nodes, rounded_arguments
from precision_compiler.verify import is_ours


@dataclass(frozen=True)
class InsertCasts:
    """Carry out an assignment with casts, at most one per (tensor, format).

    1. A contraction reads all its rounded arguments in its format. bf16 and fp16 contractions
       return that format; tf32 and scaled formats read and return float32 here, their rounding
       is a later pass's.
    2. A stored tensor is cast to its storage format where it is made; everything else reads that
       copy, so that it is what stays in memory. Formats without a plain dtype are a later pass's.
    3. Everything that is no contraction computes in float32: it reads a cast back.
    4. Casts stand at the root of a chain of views, before any broadcast; the views are repeated
       on the cast tensor.
    """

    name: ClassVar[str] = "insert-casts"
    reads: ClassVar[frozenset[str]] = frozenset({"assignment"})
    makes: ClassVar[frozenset[str]] = frozenset({"casts"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Rewrite the graph; True if any cast was needed."""
        graph = unit.joint.module.graph
        if all(entry_format(fmt) == "fp32" for fmt in unit.assignment.values()):
            return False
        if any(is_ours(node) for node in graph.nodes):  # carried out already
            return False
        return _Rewriter(graph, unit.assignment).rewrite()


class _Rewriter:
    """One rewriting of one graph."""

    def __init__(self, graph: fx.Graph, assignment: Mapping[str, str]) -> None:
        self.graph, self.mover = graph, Mover(graph)
        nodes = named_nodes(graph)
        self.entries: dict[fx.Node, torch.dtype] = {}
        self.stores: dict[fx.Node, torch.dtype] = {}
        for name, node in nodes.items():
            if contraction_rule(node) is not None and name in assignment:
                self.entries[node] = _entry_dtype(assignment[name])
                update_facts(node, site=name)
            if f"{name}.store" in assignment:
                self.stores[node] = _entry_dtype(assignment[f"{name}.store"])
        self.native = {
            result: dtype for node, dtype in self.entries.items() for result in output_nodes(node)
        }

    def rewrite(self) -> bool:
        """Serve every root its readers, then bring fake values up to date."""
        before = len(self.graph.nodes)
        roots = [node for node in self.graph.nodes if is_float32(node) and self._is_root(node)]
        uses = {root: uses_past_movement(root) for root in roots}
        self._retype()
        for root in roots:
            self._serve(root, uses[root])
        for node in self.entries:
            refresh(node)
        return len(self.graph.nodes) != before

    def _is_root(self, node: fx.Node) -> bool:
        if is_movement(node):
            return False
        readers = (user for user, _ in uses_past_movement(node))
        return node in self.stores or node in self.native or any(r in self.entries for r in readers)

    def _retype(self) -> None:
        """Contractions in a narrow format return it; so do the views of their results."""
        for result, dtype in self.native.items():
            value = value_of(result)
            if value is None or dtype == torch.float32:
                continue
            result.meta["val"] = value.to(dtype)
            for view in with_movement(result)[1:]:
                refresh(view)

    def _serve(self, root: fx.Node, uses: list[tuple[fx.Node, fx.Node]]) -> None:
        native = self.native.get(root, torch.float32)
        stored = self.stores.get(root, native)
        kept = root if stored == native else self._cast(root, stored, root, "storage format")
        copies = {stored: kept}
        for user, through in uses:
            for index, wanted in self._wants(user, through):
                if wanted not in copies:
                    reason = (
                        f"read by {user.name}" if wanted != torch.float32 else "back to float32"
                    )
                    copies[wanted] = self._cast(kept, wanted, root, reason)
                source = copies[wanted]
                if source is not root:
                    _replace(user, index, through, self.mover.moved(source, root, through))

    def _wants(self, user: fx.Node, through: fx.Node) -> list[tuple[int | None, torch.dtype]]:
        """Argument positions (None: all others) and the dtype each wants ``through`` in."""
        entry = self.entries.get(user)
        if entry is None:
            return [(None, torch.float32)]
        rounded = [index for index, node in rounded_arguments(user).items() if node is through]
        plain = [node for index, node in enumerate(user.args) if index not in rounded]
        found: list[tuple[int | None, torch.dtype]] = [(index, entry) for index in rounded]
        if through in plain or through in user.kwargs.values():
            found.append((None, torch.float32))
        return found

    def _cast(self, source: fx.Node, dtype: torch.dtype, root: fx.Node, reason: str) -> fx.Node:
        node = insert_call(self.graph, CONVERT, (source, dtype), after=source, like=root)
        facts = facts_of(root)
        name = facts.name if facts else root.name
        set_facts(node, NodeFacts(f"{name}.to_{str(dtype).rpartition('.')[2]}", None, reason))
        return node


def _replace(user: fx.Node, index: int | None, old: fx.Node, new: fx.Node) -> None:
    if index is None:
        user.replace_input_with(old, new)
    else:
        user.update_arg(index, new)


def _entry_dtype(name: str) -> torch.dtype:
    dtype = CHOICES[name].dtype if fixes_result(name) else torch.float32
    assert dtype is not None
    return dtype
