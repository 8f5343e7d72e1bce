"""Sites: the decision points of a graph, with names that people recognise.

A contraction site decides the format its operands enter the multiply-accumulate units in; a
storage site the format a materialised tensor is kept in. Names are module path plus role. The
role is read from the graph: what an operand depends on (parameters, inputs, tangents) and which
forward operation a backward one belongs to, never from a module's class.
"""

import fnmatch
import hashlib
import itertools
import operator
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, cast

import torch
from torch import fx

from precision_compiler.errors import InternalError
from precision_compiler.facts import NodeFacts, facts_of, set_facts
from precision_compiler.graph import (
    ATTENTION,
    base_name,
    contraction_depths,
    contraction_rule,
    is_backward,
    is_float32,
    is_movement,
    primals_and_tangents,
    reached_from,
    root_of,
    shape_of,
    uses_past_movement,
    value_of,
    with_movement,
)
from precision_compiler.origin import origin_of
from precision_compiler.scaling import Content

MATERIALISED_ELEMENTS = 1024
"""Tensors smaller than this stay as they are: their traffic is below a cache line per core."""


Role = Literal["fprop", "dgrad", "wgrad", "store"]


@dataclass(frozen=True)
class Site:
    """One decision point.

    Attributes:
        name: stable, human name.
        kind: "contraction" or "storage".
        role: "fprop", "dgrad", "wgrad" or "store".
        op: the ATen operation's base name; "attention" or "attention_backward" for fused ones.
        node: name of the fx node in the graph the site was found in.
        signature: operation and the dimensions that do not depend on the batch.
        shape: shape of the node's output in this graph.
    """

    name: str
    kind: Literal["contraction", "storage"]
    role: Role
    op: str
    node: str
    signature: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Provenance:
    """What the nodes of a graph depend on, as sets of nodes."""

    parameters: frozenset[fx.Node]
    inputs: frozenset[fx.Node]
    gradients: frozenset[fx.Node]

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether the node is computed from parameters alone."""
        return node in self.parameters and node not in self.inputs and node not in self.gradients

    def is_gradient(self, node: fx.Node) -> bool:
        """Whether the node depends on an output's gradient."""
        return node in self.gradients

    def content(self, node: fx.Node) -> Content:
        """What the node is as an operand."""
        if self.is_gradient(node):
            return "gradient"
        return "weight" if self.is_parameter(node) else "activation"


def provenance_of(graph: fx.Graph, parameters: frozenset[str]) -> Provenance:
    """Trace what every node depends on; ``parameters`` names the parameters' placeholders."""
    primals, tangents = primals_and_tangents(graph)
    weights = [node for node in primals if node.name in parameters]
    inputs = [node for node in primals if node.name not in parameters]
    return Provenance(
        frozenset(reached_from(weights)),
        frozenset(reached_from(inputs)),
        frozenset(reached_from(tangents)),
    )


def contents_of(
    graph: fx.Graph, parameters: frozenset[str], contractions: Collection[fx.Node]
) -> dict[tuple[fx.Node, int], Content]:
    """What each rounded argument of some contractions is; to be asked before a graph is rewritten.

    Args:
        graph: theirs.
        parameters: names of the placeholders that are parameters.
        contractions: nodes.

    Returns:
        By contraction and position of the argument.
    """
    if not contractions:
        return {}
    provenance = provenance_of(graph, parameters)
    return {
        (node, index): provenance.content(root_of(argument))
        for node in contractions
        for index, argument in rounded_arguments(node).items()
    }


def find_sites(
    graph: fx.Graph, parameters: frozenset[str], saved: frozenset[str]
) -> tuple[Site, ...]:
    """Name every float node of ``graph`` and return its decision points in graph order.

    Args:
        graph: joint or inference graph; its nodes get their stable names as facts.
        parameters: names of the placeholders that are parameters.
        saved: names of the nodes that the partitioner keeps for the backward pass.
    """
    provenance = provenance_of(graph, parameters)
    name_nodes(graph, provenance)
    depths = contraction_depths(graph)
    sites = []
    for node in graph.nodes:
        if _is_contraction_site(node):
            sites.append(_contraction_site(node, provenance))
        if _is_storage_site(node, saved, depths):
            sites.append(_storage_site(node))
    return tuple(sites)


def name_nodes(graph: fx.Graph, provenance: Provenance) -> None:
    """Give every computing node its stable name (facts), unique within the graph."""
    roles = _contraction_roles(graph, provenance)
    taken: set[str] = set()
    for node in graph.nodes:
        if node.op != "call_function" or is_movement(node):
            continue
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue  # with open sizes, nodes are called as with fixed ones
        if node.target is operator.getitem:
            set_facts(node, NodeFacts(f"{_name_of(node.args[0])}.{node.args[1]}"))
        elif node in roles:  # matmul_1 is another product than the second gradient of matmul
            stem, suffix = roles[node]
            set_facts(node, NodeFacts(_free_name(stem, ".", suffix, taken)))
        else:
            suffix = ".grad" if is_backward(node) else ""
            set_facts(node, NodeFacts(_free_name(_operation_path(node), "_", suffix, taken)))


def _free_name(stem: str, mark: str, suffix: str, taken: set[str]) -> str:
    """``stem + suffix``, or with ``mark`` and the first number between them that is not taken."""
    numbered = (f"{stem}{mark}{index}{suffix}" for index in itertools.count(1))
    names = itertools.chain([f"{stem}{suffix}"], numbered)
    name = next(name for name in names if name not in taken)
    taken.add(name)
    return name


def operand_nodes(node: fx.Node) -> list[fx.Node]:
    """The operands of a contraction, in the order of its rule."""
    rule = contraction_rule(node)
    found = [node.args[index] for index in rule.operands] if rule else []
    return [operand for operand in found if isinstance(operand, fx.Node)]


def rounded_arguments(node: fx.Node) -> dict[int, fx.Node]:
    """Arguments of a contraction that enter it in its format: operands and companions."""
    rule = contraction_rule(node)
    found = {index: node.args[index] for index in rule.operands + rule.companions} if rule else {}
    return {index: value for index, value in found.items() if isinstance(value, fx.Node)}


def output_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold a contraction's results in the operands' dtype."""
    rule = contraction_rule(node)
    if rule is None or rule.outputs is None:
        return [node]
    return [
        user for user in node.users if user.args[1] in rule.outputs and value_of(user) is not None
    ]


def fingerprint(sites: Iterable[Site]) -> str:
    """Hash of the sites' names and signatures: the same for every batch of one model."""
    text = "\n".join(
        f"{site.name} {site.signature}" for site in sites if site.kind == "contraction"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Names that match a glob such as ``blocks.*.fc.wgrad``."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def named_nodes(graph: fx.Graph) -> dict[str, fx.Node]:
    """Nodes by their stable names, once they have them."""
    found = ((facts_of(node), node) for node in graph.nodes)
    return {facts.name: node for facts, node in found if facts is not None}


def by_name(sites: Iterable[Site]) -> Mapping[str, Site]:
    """Sites by their names."""
    return {site.name: site for site in sites}


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module that the node (or its forward node) belongs to."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0]
    return re.sub(r"^[LG]\['[^']*'\](\[\d+\])?\.?", "", path)


def _name_of(node: object) -> str:
    facts = facts_of(node) if isinstance(node, fx.Node) else None
    if facts is None:
        raise InternalError(f"node {node} is read before it has a name")
    return facts.name


def _operation_path(node: fx.Node) -> str:
    original = base_name(node.meta.get("original_aten", node.target))
    words = [re.sub(r"^(native)?_+|^native_|_backward(_data)?$|_forward$", "", original)]
    own = base_name(node.target)
    if own not in (original, words[0]) and own != "getitem":
        words.append(own.lstrip("_"))
    return ".".join(part for part in (module_path(node), *words) if part)


def _contraction_roles(graph: fx.Graph, provenance: Provenance) -> dict[fx.Node, tuple[str, str]]:
    """Stem and role suffix of every contraction: (``blocks.3.fc``, ``.wgrad``)."""
    forward: dict[object, str] = {}
    roles: dict[fx.Node, tuple[str, str]] = {}
    stems: set[str] = set()
    for node in graph.nodes:
        if contraction_rule(node) is None:
            continue
        sequence = node.meta.get("seq_nr")
        if not any(provenance.is_gradient(operand) for operand in operand_nodes(node)):
            stem = _free_name(_contraction_stem(node, provenance), "_", "", stems)
            forward[sequence] = stem
            roles[node] = (stem, ".fprop")
        else:
            stem = forward.get(sequence) or _contraction_stem(node, provenance)
            roles[node] = (stem, f".{_gradient_role(node, stem, provenance)}")
    return roles


def _contraction_stem(node: fx.Node, provenance: Provenance) -> str:
    path = module_path(node)
    if any(provenance.is_parameter(operand) for operand in operand_nodes(node)):
        return path or "linear"
    label = "sdpa" if node.target in ATTENTION else "matmul"
    return f"{path}.{label}" if path else label


def _gradient_role(node: fx.Node, stem: str, provenance: Provenance) -> str:
    """dgrad: gradient times weight (or attention); wgrad: gradient times saved activation."""
    operands = operand_nodes(node)
    if any(provenance.is_parameter(operand) for operand in operands):
        return "dgrad"
    functional = stem.rpartition(".")[2].rstrip("_0123456789") in ("sdpa", "matmul")
    return "dgrad" if functional else "wgrad"


def _is_contraction_site(node: fx.Node) -> bool:
    return contraction_rule(node) is not None and all(map(is_float32, operand_nodes(node)))


def _contraction_site(node: fx.Node, provenance: Provenance) -> Site:
    name = _name_of(node)
    role = cast(Role, name.rpartition(".")[2])
    outputs = output_nodes(node)
    shape = shape_of(outputs[0]) if outputs else ()
    operands = operand_nodes(node)
    weights = [shape_of(operand) for operand in operands if provenance.is_parameter(operand)]
    if weights:
        dimensions = weights[0]
    elif role == "wgrad":
        dimensions = shape
    else:  # the width of attention heads; lengths and batch are the data's business
        dimensions = shape_of(operands[0])[-1:] if node.target in ATTENTION else ()
    operation = _operation_of(node)
    signature = f"{operation}{list(dimensions)}"
    return Site(name, "contraction", role, operation, node.name, signature, shape)


def _operation_of(node: fx.Node) -> str:
    """The operation's base name; of attention, whose name differs by device, what it is."""
    if node.target not in ATTENTION:
        return base_name(node.target)
    return "attention_backward" if is_backward(node) else "attention"


def _is_storage_site(node: fx.Node, saved: frozenset[str], depths: Mapping[fx.Node, int]) -> bool:
    """Whether a float32 tensor is written to memory.

    It is where (1) a contraction produces or reads it, (2) the partitioner saves it for the
    backward pass, or (3) it is read on both sides of a contraction in the same direction. Of a
    graph from an ONNX file, where (4) it is a value of that file: a runtime keeps all of them.
    """
    if node.op != "call_function" or is_movement(node) or not is_float32(node):
        return False
    if _is_contraction_result(node):
        return True
    origin = origin_of(node)
    if origin is not None:
        return origin.value is not None
    if _is_reduction(node) or node.target is operator.getitem or _is_uniform(node):
        return False
    if prod(shape_of(node)) < MATERIALISED_ELEMENTS:
        return False
    uses = [user for user, _ in uses_past_movement(node)]
    if any(contraction_rule(user) for user in uses):
        return True
    onward = [user for user in uses if is_backward(user) == is_backward(node)]
    if any(depths[user] > depths[node] for user in onward):
        return True
    return any(seen.name in saved for seen in with_movement(node))


def _is_contraction_result(node: fx.Node) -> bool:
    if contraction_rule(node) is not None:
        return True
    parent = node.args[0] if node.args else None
    return (
        isinstance(parent, fx.Node)
        and contraction_rule(parent) is not None
        and node in output_nodes(parent)
    )


def _is_reduction(node: fx.Node) -> bool:
    """Whether a node sums or compares along a dimension: its result stays in float32."""
    return torch.Tag.reduction in getattr(node.target, "tags", ())


def _is_uniform(node: fx.Node) -> bool:
    """Whether all elements are computed from single numbers: such a tensor needs no memory."""
    return all(prod(shape_of(root_of(source))) == 1 for source in node.all_input_nodes)


def _storage_site(node: fx.Node) -> Site:
    parent = node.args[0] if node.target is operator.getitem else node
    assert isinstance(parent, fx.Node)
    operation = base_name(parent.target)
    return Site(
        f"{_name_of(node)}.store",
        "storage",
        "store",
        operation,
        node.name,
        operation,
        shape_of(node),
    )
