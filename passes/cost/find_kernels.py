"""See FindKernels."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.fusion import Kernel, kernels_of
from precision_compiler.graph import (
    contraction_depths,
    contraction_rule,
    is_backward,
    is_movement,
    root_of,
)
from precision_compiler.origin import origin_of
from precision_compiler.pipeline import Numerics, Unit


@dataclass(frozen=True)
class FindKernels:
    """Find out which kernels the graph compiles to, and which tensors they read and write.

    1. On this machine Inductor is asked: its lowering and scheduler run on the forward and the
       backward pass, without generating code.
    2. For other targets, one kernel is expected for the fused operations of each direction at
       each contraction depth. It writes what a later kernel or contraction reads, and reads what
       earlier ones wrote; what the partitioner does not save for the backward pass is computed
       again there from what it saves.
    3. A graph from an ONNX file is executed as it stands there: one kernel for each of its nodes.
    """

    name: ClassVar[str] = "find-kernels"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset({"kernels"})
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, unit: Unit) -> bool:
        """Fill ``unit.kernels``."""
        joint = unit.joint
        literal = any(origin_of(node) is not None for node in joint.module.graph.nodes)
        asked = unit.target.machine is not None and bool(joint.parts) and not literal
        if asked:
            parts = (kernels_of(part, inference=joint.inference) for part in joint.parts)
            unit.kernels = tuple(kernel for part in parts for kernel in part)
        else:
            unit.kernels = tuple(expected_kernels(joint.module.graph, joint.saved))
        generated = sum(kernel.generated for kernel in unit.kernels)
        how = "Inductor's scheduler" if asked else "contraction depths"
        how = "nodes of the file" if literal else how
        unit.journal.note(self.name, f"{generated} fused kernels, by {how}")
        return False


def expected_kernels(graph: fx.Graph, saved: frozenset[str]) -> Iterator[Kernel]:
    """The fused kernels of a graph by rules 2 and 3, in the order of their depth."""
    depths = contraction_depths(graph)
    groups: dict[tuple[bool, int | str], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        origin = origin_of(node)
        place = depths[node] if origin is None else origin.node
        if is_fused(node) and place != _ARGUMENT:
            groups[is_backward(node), place].append(node)
    for (backward, _), nodes in groups.items():
        group = set(nodes)
        read: dict[str, None] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                read.update(dict.fromkeys(_in_memory(root_of(source), group, backward, saved)))
        written = (node.name for node in nodes if _outlives(node, group, backward, saved))
        names = tuple(node.name for node in nodes)
        yield Kernel(names, tuple(read), tuple(written), True, backward)


_ARGUMENT = ""  # the copy of a constant or an input of the file: nothing that runs


def is_fused(node: fx.Node) -> bool:
    """Whether Inductor generates the kernel that computes a node, so that a cast joins it."""
    if node.op != "call_function" or contraction_rule(node) is not None or is_movement(node):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags


def _in_memory(
    source: fx.Node, group: set[fx.Node], backward: bool, saved: frozenset[str]
) -> Iterator[str]:
    """The tensors in memory that a kernel reads for ``source``."""
    if source in group:
        return
    recomputed = backward and not is_backward(source) and source.name not in saved
    if recomputed and is_fused(source):
        for parent in source.all_input_nodes:
            yield from _in_memory(root_of(parent), group, backward, saved)
    else:
        yield source.name


def _outlives(node: fx.Node, group: set[fx.Node], backward: bool, saved: frozenset[str]) -> bool:
    """Whether a kernel must write a node's tensor."""
    if node.name in saved:
        return True
    waiting = list(node.users)
    for user in waiting:
        if is_movement(user):
            waiting.extend(user.users)
        elif user.op == "output" or (user not in group and is_backward(user) == backward):
            return True
    return False
