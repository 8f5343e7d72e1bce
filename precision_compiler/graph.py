"""Questions about an fx graph of ATen operations, and the few edits everything else is built of."""

import contextlib
import copy
import itertools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

import networkx
import torch
from torch import fx
from torch._subclasses import FakeTensor

from precision_compiler.sizes import size_hint

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default

_COPIES = frozenset({aten.clone.default, aten._unsafe_view.default, aten.contiguous.default})
"""Operations that move elements without computing, beside those whose schema says they alias."""


@dataclass(frozen=True)
class ContractionRule:
    """How one ATen contraction reads its arguments.

    Attributes:
        operands: positions of the arguments that enter the multiply-accumulate units.
        companions: positions and names of further float arguments that the operation wants in
            the operands' dtype (a bias); they are small and rounded along.
        output: index of the output that carries the operands' dtype, None for a single output.
        flops: multiply and add operations, from the shapes of operands and output.
    """

    operands: tuple[int, ...]
    companions: tuple[int, ...]
    outputs: tuple[int, ...] | None
    flops: Callable[[list[tuple[int, ...]], tuple[int, ...]], int]


def _matmul_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return 2 * prod(output) * shapes[0][-1]


def _attention_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    query, key = shapes[0], shapes[1]  # batch, heads, length, width
    return 4 * prod(query) * key[-2]


def _attention_backward_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return 10 * prod(shapes[1]) * shapes[2][-2]  # five products where the forward has two


def _convolution_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return 2 * prod(output) * prod(shapes[1][1:])


def _convolution_backward_flops(shapes: list[tuple[int, ...]], output: tuple[int, ...]) -> int:
    return 4 * prod(shapes[0]) * prod(shapes[2][1:])


CONTRACTIONS: dict[Any, ContractionRule] = {
    aten.mm.default: ContractionRule((0, 1), (), None, _matmul_flops),
    aten.addmm.default: ContractionRule((1, 2), (0,), None, _matmul_flops),
    aten.bmm.default: ContractionRule((0, 1), (), None, _matmul_flops),
    aten.baddbmm.default: ContractionRule((1, 2), (0,), None, _matmul_flops),
    aten._scaled_dot_product_flash_attention_for_cpu.default: ContractionRule(
        (0, 1, 2), (), (0,), _attention_flops
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: ContractionRule(
        (0, 1, 2, 3, 4), (), (0, 1, 2), _attention_backward_flops
    ),
    aten._scaled_dot_product_efficient_attention.default: ContractionRule(
        (0, 1, 2), (3,), (0,), _attention_flops
    ),
    aten._scaled_dot_product_efficient_attention_backward.default: ContractionRule(
        (0, 1, 2, 3, 5), (4,), (0, 1, 2), _attention_backward_flops
    ),
    aten.convolution.default: ContractionRule((0, 1), (2,), None, _convolution_flops),
    aten.convolution_backward.default: ContractionRule(
        (0, 1, 2), (), (0, 1, 2), _convolution_backward_flops
    ),
}
"""ATen operations that run on multiply-accumulate units, and how to read each."""

ATTENTION = frozenset(
    op
    for op, rule in CONTRACTIONS.items()
    if rule.flops in (_attention_flops, _attention_backward_flops)
)
"""Fused attention: what torch captures in float32, on the CPU and on GPUs."""


def contraction_rule(node: fx.Node) -> ContractionRule | None:
    """Return how to read ``node`` if it is a contraction."""
    return CONTRACTIONS.get(node.target) if node.op == "call_function" else None


def is_matrix_product(node: fx.Node) -> bool:
    """Whether a node is one product of two matrices, or a batch of them."""
    rule = contraction_rule(node)
    return rule is not None and rule.flops is _matmul_flops


def value_of(node: fx.Node) -> torch.Tensor | None:
    """The fake tensor a node produces, or None if it produces something else."""
    value = node.meta.get("val")
    return value if isinstance(value, torch.Tensor) else None


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Shape of the tensor a node produces, symbolic sizes at their hint."""
    value = value_of(node)
    return () if value is None else tuple(size_hint(size) for size in value.shape)


def has_open_sizes(node: fx.Node) -> bool:
    """Whether a size of the tensor that the node produces is left open by the capture."""
    value = value_of(node)
    return value is not None and any(isinstance(size, torch.SymInt) for size in value.shape)


def is_float32(node: fx.Node) -> bool:
    """Whether the node produces one float32 tensor."""
    value = value_of(node)
    return value is not None and value.dtype == torch.float32


def base_name(target: object) -> str:
    """``aten.addmm.default`` -> ``addmm``; a builtin function -> its name."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


@cache
def _aliases(target: object) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    returned = [result.alias_info for result in target._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def is_movement(node: fx.Node) -> bool:
    """Whether a node only moves or reinterprets the elements of its first argument."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is operator.getitem:
        return is_movement(node.args[0])
    return node.target in _COPIES or _aliases(node.target)


def is_view(node: fx.Node) -> bool:
    """Whether a node shows the very elements of its first argument, copying nothing."""
    return is_movement(node) and _aliases(node.target)


def root_of(node: fx.Node) -> fx.Node:
    """The node that computed the elements which ``node`` shows, past views and copies."""
    while is_movement(node):
        parent = node.args[0]
        assert isinstance(parent, fx.Node)
        node = parent
    return node


def made_by(operand: fx.Node) -> fx.Node:
    """What computes an operand, past views, copies and roundings."""
    node = root_of(operand)
    while is_cast(node):
        assert isinstance(node.args[0], fx.Node)
        node = root_of(node.args[0])
    return node


def primals_and_tangents(graph: fx.Graph) -> tuple[list[fx.Node], list[fx.Node]]:
    """The placeholders of a joint graph: those of its inputs, and of gradients of its results."""
    primals, tangents = list[fx.Node](), list[fx.Node]()
    for node in graph.find_nodes(op="placeholder"):
        (tangents if "tangents" in str(node.target) else primals).append(node)
    return primals, tangents


def reached_from(starts: Iterable[fx.Node]) -> set[fx.Node]:
    """All nodes that depend on any of ``starts``, the starts included."""
    sources = list(starts)
    if not sources:
        return set()
    flow: networkx.DiGraph[fx.Node] = networkx.DiGraph()
    flow.add_nodes_from(sources)
    flow.add_edges_from((node, user) for node in sources[0].graph.nodes for user in node.users)
    return set(itertools.chain.from_iterable(networkx.bfs_layers(flow, sources)))


def with_movement(root: fx.Node) -> list[fx.Node]:
    """The root and every view or copy of its elements."""
    found = [root]
    for node in found:
        found.extend(user for user in node.users if is_movement(user) and user.args[0] is node)
    return found


def uses_past_movement(root: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Pairs (node that computes with the root's elements, the argument it reads them through)."""
    moved = with_movement(root)
    inside = set(moved)
    return [(user, node) for node in moved for user in node.users if user not in inside]


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """The same graph in a module of its own; weights and node names are kept."""
    with warnings.catch_warnings():  # torch copies its own graphs with a class it deprecates
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        twin = fx.GraphModule(module, copy.deepcopy(module.graph))
    twin.meta.update(module.meta)
    return twin


def is_backward(node: fx.Node) -> bool:
    """Whether autograd made a node for the backward pass, as the capture has marked it."""
    return bool(node.meta.get("partitioner_tag") == "is_backward")


def contraction_depths(graph: fx.Graph) -> dict[fx.Node, int]:
    """For every node, the largest number of contractions on a path that ends before or at it.

    No fused kernel reaches across a contraction, so a tensor that is read at a greater depth
    than its own is kept in memory between the two.
    """
    depths: dict[fx.Node, int] = {}
    for node in graph.nodes:
        above = max((depths[source] for source in node.all_input_nodes), default=0)
        depths[node] = above + (contraction_rule(node) is not None)
    return depths


def is_cast(node: fx.Node) -> bool:
    """Whether a node only changes the dtype of its argument."""
    return node.op == "call_function" and node.target is CONVERT


def insert_call(
    graph: fx.Graph,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    after: fx.Node,
    like: fx.Node,
    value: Any = None,
) -> fx.Node:
    """Insert a call behind ``after`` with its fake value, and the provenance of ``like``.

    ``value`` is the fake value where it is known; it is computed from the arguments' otherwise.

    The new node is computed where ``like`` was, forward or backward, as far as Inductor's
    partitioner is concerned.
    """
    following = after.next
    while after.op == "placeholder" and following.op == "placeholder":
        following = following.next
    with graph.inserting_before(following):
        node = graph.call_function(target, args, dict(kwargs or {}))
    if value is None:
        refresh(node)
    else:
        node.meta["val"] = value
    for key in ("partitioner_tag", "nn_module_stack", "fwd_nn_module_stack", "stack_trace"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def refresh(node: fx.Node) -> None:
    """Compute a node's fake value anew from those of its arguments."""
    args = fx.node.map_arg(node.args, lambda argument: argument.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda argument: argument.meta["val"])
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    modes = [leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)]
    with modes[0] if modes else contextlib.nullcontext():
        assert callable(node.target)
        node.meta["val"] = node.target(*args, **kwargs)


class Mover:
    """Repeats chains of views on other tensors, each (view, tensor) pair once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def moved(self, base: fx.Node, root: fx.Node, through: fx.Node) -> fx.Node:
        """``through`` shows ``root``'s elements; return a node that shows ``base``'s likewise."""
        if through is root:
            return base
        key = (through, base)
        if key not in self._made:
            parent = through.args[0]
            assert isinstance(parent, fx.Node)
            args = (self.moved(base, root, parent), *through.args[1:])
            self._made[key] = self._repeat(through, args)
        return self._made[key]

    def _repeat(self, view: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(view):
            node = self.graph.call_function(view.target, args, dict(view.kwargs))  # type: ignore[arg-type]
        node.meta.update({key: value for key, value in view.meta.items() if key != "val"})
        refresh(node)
        return node
