"""What is written beside every node of a file: the plan's decision for it, as the file has it."""

from dataclasses import replace

import onnx_ir as ir

from precision_compiler.annotate.onnx_file import OnnxFile
from precision_compiler.annotate.rewrite import Describe
from precision_compiler.export.annotations import node_entries
from precision_compiler.facts import facts_of
from precision_compiler.origin import origin_of
from precision_compiler.plan import NodeChoice, Plan


def _reason(file: OnnxFile, node: ir.Node) -> str:
    if node.outputs[0] not in file.imported.dtypes:
        source = node.inputs[0]
        return f"cast of {source.name if source is not None else ''}, inserted"
    return "moves elements" if file.is_dynamic(node) else "computed from constants"


def describer(file: OnnxFile, plan: Plan) -> Describe:
    """The function that gives a node of the file its metadata."""
    choices = {choice.name: choice for choice in plan.nodes}
    known: dict[str, NodeChoice] = {}
    for node in file.joint.module.graph.nodes:
        origin, facts = origin_of(node), facts_of(node)
        choice = choices.get(facts.name) if facts is not None else None
        if origin is None or choice is None:
            continue
        earlier = known.get(origin.node)
        if earlier is None or earlier.site is None or choice.site in plan.sites:
            decided = earlier is not None and earlier.site == earlier.name  # a contraction's
            known[origin.node] = earlier if decided and earlier is not None else choice

    def describe(node: ir.Node, computed: str, stored: str) -> dict[str, str]:
        choice = known.get(str(node.name))
        if choice is None:
            reason = _reason(file, node)
            choice = NodeChoice(str(node.name), node.op_type, None, "", "", reason, 0.0, 0.0)
        return node_entries(replace(choice, compute_format=computed, storage_format=stored))

    return describe
