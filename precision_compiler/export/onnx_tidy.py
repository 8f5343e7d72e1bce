"""What is done to a model that the exporter has made: our entries, our names, less clutter."""

import re
from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as clean_up
import onnxscript.optimizer
import torch

ORIGIN = "precision_compiler.origin"
"""Metadata key of every ONNX node: the fx node it comes from, or ``exporter``."""

FX_NODE = "precision_compiler.fx_node"
"""Key of ``node.meta["custom"]`` that carries an fx node's name through the exporter."""


def annotate(program: torch.onnx.ONNXProgram, annotations: Mapping[str, Mapping[str, str]]) -> None:
    """Replace the exporter's metadata, which quotes source code and paths, by our own.

    The exporter calls a value by the name of its own fx node. That finds the origin of a node
    which it inlined from a function, where it keeps no link to the fx node.
    """
    made = program.exported_program.graph.nodes if program.exported_program else ()
    origins = {node.name: node.meta.get("custom", {}).get(FX_NODE) for node in made}
    program.model.graph.metadata_props.clear()
    for node in program.model.graph:
        source = node.meta.get("node")
        names = [source.name] if source is not None else [out.name for out in node.outputs]
        origin = next((origins[name] for name in names if name in origins), None)
        node.metadata_props.clear()
        if origin is not None:
            node.metadata_props.update({**annotations.get(origin, {}), ORIGIN: origin})


def tidy(model: ir.Model) -> None:
    """Inline functions, compute constants and lift them; nodes this made are annotated too."""
    clean_up.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    clean_up.RemoveUnusedNodesPass()(model)
    clean_up.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    clean_up.DeduplicateInitializersPass()(model)
    clean_up.OutputFixPass()(model)
    clean_up.RemoveUnusedOpsetsPass()(model)
    for node in model.graph:
        if ORIGIN not in node.metadata_props:
            node.metadata_props.update({**_nearest_entries(node), ORIGIN: "exporter"})


def _nearest_entries(start: ir.Node) -> Mapping[str, str]:
    """The entries of the nearest node with an origin in fx, consumers before producers."""
    queue, seen = [start], {start}
    for node in queue:
        if node.metadata_props.get(ORIGIN, "exporter") != "exporter":
            return node.metadata_props
        around = [*node.successors(), *node.predecessors()]
        queue += [other for other in around if other not in seen]
        seen.update(around)
    return {}


def name_sizes(model: ir.Model, sizes: Sequence[Mapping[int, str]]) -> None:
    """Call open sizes as the user does wherever they occur, in expressions too."""
    names: dict[str, str] = {}
    for value, held in zip(model.graph.inputs, sizes, strict=True):
        for dimension, name in held.items():
            assert value.shape is not None
            names.setdefault(str(value.shape[dimension]), name)
    made = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *made):
        for index, size in enumerate(value.shape or ()):
            if not isinstance(size, int) and size.value is not None:
                said = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
                assert value.shape is not None
                value.shape[index] = said
