"""An imported graph as Inductor captures it, its nodes tagged with the ONNX values they compute."""

from collections.abc import Mapping

import torch
from torch import fx

from precision_compiler.graph import (
    Mover,
    aten,
    contraction_rule,
    insert_call,
    is_float32,
    root_of,
    uses_past_movement,
)
from precision_compiler.importing.importer import Imported
from precision_compiler.joint import JointGraph, trace_joint
from precision_compiler.origin import Origin, origin_of, set_origin


def joint_of(imported: Imported) -> JointGraph:
    """Capture an imported graph.

    Every ONNX value that is computed becomes a place whose format can be decided: a runtime
    executes the file node by node and keeps each of them in memory. So do float constants and
    inputs that anything but a contraction computes with: a copy of them stands in the graph, since
    only what is computed has a place.
    """
    with torch.no_grad():
        joint = trace_joint(imported.module, imported.arguments)
    joint.names = list(imported.names)
    _tag_values(joint.module.graph, imported.results)
    _hold_arguments(joint)
    joint.module.recompile()
    return joint.with_inputs(imported.arguments)  # which names the sites


def _tag_values(graph: fx.Graph, results: Mapping[str, str]) -> None:
    """The last fx node of an ONNX node computes its value, or shows the one that does."""
    last = {origin.node: node for node in graph.nodes if (origin := origin_of(node)) is not None}
    for name, node in last.items():
        root = root_of(node)
        origin = origin_of(root)
        if origin is not None and origin.node == name:
            set_origin(root, Origin(name, results[name]))


def _hold_arguments(joint: JointGraph) -> None:
    graph, mover = joint.module.graph, Mover(joint.module.graph)
    names = dict(zip(graph.find_nodes(op="placeholder"), joint.names, strict=True))
    last = list(names)[-1]
    for holder, name in names.items():
        if not is_float32(holder):
            continue
        readers = [pair for pair in uses_past_movement(holder) if _computes_with(*pair)]
        if not readers:
            continue
        copy = insert_call(graph, aten.mul.Tensor, (holder, 1.0), after=last, like=holder)
        set_origin(copy, Origin("", name))
        copy.meta["nn_module_stack"] = {name: (name, "argument")}
        for user, through in readers:
            user.replace_input_with(through, mover.moved(copy, holder, through))


def _computes_with(user: fx.Node, argument: fx.Node) -> bool:
    """Whether a node computes with a value: not a contraction, and not a mere selection of it.

    What selects (an embedding) can be rounded after as well as before.
    """
    if user.op != "call_function" or contraction_rule(user) is not None:
        return False
    return any(source is not argument and is_float32(source) for source in user.all_input_nodes)
