"""See EmulateFormats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler.emulation import EMULATED_ATTENTION, QUANTISE
from precision_compiler.facts import NodeFacts, facts_of, set_facts, update_facts
from precision_compiler.formats import CHOICES
from precision_compiler.graph import CONVERT, Mover, contraction_rule, insert_call, root_of
from precision_compiler.joint import JointGraph
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import fixes_result
from precision_compiler.scaling import RECIPES, Content
from precision_compiler.sites import contents_of, named_nodes, rounded_arguments


@dataclass(frozen=True)
class EmulateFormats:
    """Emulate formats that torch cannot multiply or store as a plain dtype, or all formats.

    The numerics of a tensor core with float32 accumulation at the speed of float32: for trying
    a plan, not for pace. Without ``everything`` only tf32 and formats with a scale are emulated,
    beside casts that carry out the rest; with it, every format is, and there are no casts.

    1. A stored tensor is rounded where it is made; everything reads the rounded one.
    2. A contraction's arguments are rounded to its format, each (tensor, format) once. Small
       companions (biases) of scaled formats and tf32 stay float32, as in hardware.
       Where rows or blocks have scales, each argument is rounded where it is read, along the axis
       that the product sums over, as the recipe treats weights, activations or gradients; every
       (argument, axis) once.
    3. Attention is computed by its formula, with what the kernel rounds inside rounded.
    """

    everything: bool = False
    name: ClassVar[str] = "emulate-formats"
    reads: ClassVar[frozenset[str]] = frozenset({"assignment"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Round what is stored and what is multiplied."""
        emulated = {
            name: fmt
            for name, fmt in unit.assignment.items()
            if fmt != "fp32" and (self.everything or not fixes_result(fmt))
        }
        found = _Emulator(unit.joint, emulated).emulate() if emulated else set()
        if found:
            names = ", ".join(sorted(found, key=list(CHOICES).index))
            unit.journal.note(self.name, f"emulated here, at float32 speed: {names}")
        return bool(found)


class _Emulator:
    """One emulation of one graph."""

    def __init__(self, joint: JointGraph, formats: Mapping[str, str]) -> None:
        self.joint, self.graph, self.formats = joint, joint.module.graph, formats
        self.mover = Mover(self.graph)
        self.rounded: dict[tuple[fx.Node, str], fx.Node] = {}
        self.blocks: dict[tuple[fx.Node, str, int], fx.Node] = {}
        self.format_of: dict[fx.Node, str] = {}
        self.contents: dict[tuple[fx.Node, int], Content] = {}

    def emulate(self) -> set[str]:
        """Rewrite the graph; return the formats that it now emulates."""
        nodes = named_nodes(self.graph)
        if any(facts.reason == _REASON for facts in map(facts_of, nodes.values()) if facts):
            return set()  # emulated already
        recipes = [node for name, node in nodes.items() if self.formats.get(name) in RECIPES]
        self.contents = contents_of(self.graph, self.joint.parameters, recipes)
        for name, node in nodes.items():
            fmt = self.formats.get(f"{name}.store")
            if fmt is not None:
                self._store(node, fmt)
        for name, node in nodes.items():
            fmt = self.formats.get(name)
            if fmt is not None and contraction_rule(node):
                self._contract(name, node, fmt)
        return set(self.format_of.values())

    def _store(self, node: fx.Node, fmt: str) -> None:
        users = list(node.users)
        copy = self._rounded(node, fmt)
        for user in users:
            user.replace_input_with(node, copy)

    def _contract(self, name: str, node: fx.Node, fmt: str) -> None:
        rule = contraction_rule(node)
        assert rule is not None
        update_facts(node, site=name, reason=f"operands rounded to {fmt}, emulated")
        for index, argument in rounded_arguments(node).items():
            if index in rule.companions and not fixes_result(fmt):
                continue
            if CHOICES[fmt].by_axis:
                axis = -1 if index == rule.operands[0] else -2
                content = self.contents.get((node, index), "activation")
                node.update_arg(index, self._blocks(argument, fmt, axis, content))
                continue
            root = root_of(argument)
            if self.format_of.get(root) == fmt:
                continue
            copy = self._rounded(root, fmt)
            node.update_arg(index, self.mover.moved(copy, root, argument))
        if node.target in EMULATED_ATTENTION:
            options = (node.kwargs.get("attn_mask"), node.kwargs.get("scale"))
            given = [*node.args, *_DEFAULTS[len(node.args) :]]
            node.target = EMULATED_ATTENTION[node.target]
            node.args, node.kwargs = (*given, *options, fmt), {}

    def _blocks(self, argument: fx.Node, fmt: str, axis: int, content: Content) -> fx.Node:
        """A copy of an argument with scales along the axis that is summed over, made once."""
        key = argument, fmt, axis
        if key not in self.blocks:
            how = (fmt, axis, None, content)
            self.blocks[key] = self._call(QUANTISE, argument, how, argument, f"to_{fmt}")
            self.format_of[self.blocks[key]] = fmt
        return self.blocks[key]

    def _rounded(self, root: fx.Node, fmt: str) -> fx.Node:
        """A copy of a tensor on a format's grid, made once."""
        if (root, fmt) not in self.rounded:
            copy = self._spelt(root, fmt)
            self.rounded[root, fmt], self.format_of[copy] = copy, fmt
        return self.rounded[root, fmt]

    def _spelt(self, root: fx.Node, fmt: str) -> fx.Node:
        """Casts there and back, which Inductor fuses, or an operation of our own."""
        dtype = CHOICES[fmt].dtype
        if not fixes_result(fmt) or dtype is None:
            return self._call(QUANTISE, root, (fmt,), root, f"to_{fmt}")
        narrow = self._call(CONVERT, root, (dtype,), root, f"to_{fmt}")
        return self._call(CONVERT, narrow, (torch.float32,), root, f"on_{fmt}")

    def _call(
        self, target: Any, source: fx.Node, to: tuple[Any, ...], root: fx.Node, label: str
    ) -> fx.Node:
        node = insert_call(self.graph, target, (source, *to), after=source, like=root)
        facts = facts_of(root)
        stem = facts.name if facts else root.name
        set_facts(node, NodeFacts(f"{stem}.{label}", None, _REASON))
        return node


_REASON = "rounded, emulated"

_DEFAULTS = (None, None, None, 0.0, False)
"""Of attention's positional arguments, those that are left out: no dropout, not causal."""
