"""Write emulated operand rounding in operations that ONNX has."""

from typing import Any

import torch
from torch import fx

from precision_compiler.emulation import EMULATED_ATTENTION, QUANTISE
from precision_compiler.errors import ExportError
from precision_compiler.facts import NodeFacts, facts_of, set_facts
from precision_compiler.formats import FORMATS
from precision_compiler.graph import CONVERT, aten, insert_call

_SMALLEST_AMAX = 1e-30  # keeps the scale of an all-zero tensor finite


def spell_out_rounding(module: fx.GraphModule) -> None:
    """Replace every emulating operation of a graph.

    tf32 operands are float32 in memory and need no operation: the node's annotation says what
    the hardware makes of them. Scaled formats become scale, clamp, cast and cast back.
    """
    graph = module.graph
    plain = {emulated: target for target, emulated in EMULATED_ATTENTION.items()}
    for node in list(graph.nodes):
        if node.target in plain:  # what attention rounds inside has no ONNX operation
            *args, mask, scale, _ = node.args
            node.target, node.args = plain[node.target], tuple(args)
            node.kwargs = {"attn_mask": mask, "scale": scale}
        if node.target is not QUANTISE:
            continue
        source, name, *axis = node.args
        if axis:
            raise ExportError(
                f"{node.name}: {name} cannot be exported yet: make a plan for a target without it"
            )
        replacement = source if name == "tf32" else _quantised(graph, node, str(name))
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
    graph.lint()
    module.recompile()


def _quantised(graph: fx.Graph, node: fx.Node, name: str) -> fx.Node:
    """The operand on the format's grid: the largest power-of-two scale that fits its amax."""
    fmt, last = FORMATS[name], node
    facts = facts_of(node)
    stem = facts.name if facts else node.name

    def call(target: Any, *args: Any) -> fx.Node:
        nonlocal last
        last = insert_call(graph, target, args, after=last, like=node)
        set_facts(last, NodeFacts(f"{stem}.{last.name}", None, f"quantisation to {name}"))
        return last

    source = node.args[0]
    amax = call(aten.max.default, call(aten.abs.default, source))
    amax = call(aten.clamp_min.default, amax, _SMALLEST_AMAX)
    room = call(aten.mul.Tensor, call(aten.reciprocal.default, amax), fmt.max_finite)
    scale = call(aten.exp2.default, call(aten.floor.default, call(aten.log2.default, room)))
    scaled = call(aten.mul.Tensor, source, scale)
    inside = call(aten.clamp.default, scaled, -fmt.max_finite, fmt.max_finite)
    narrow = call(CONVERT, inside, fmt.dtype)
    return call(aten.div.Tensor, call(CONVERT, narrow, torch.float32), scale)
