"""Recognise the cross entropy of logits and its gradient, by comparing with torch's own.

Torch decomposes the loss into twenty plain operations. The same decomposition of the loss alone,
traced on tensors without contents, is compared with the graph from its end: every operation, every
number and every size. Roundings that a plan has put between them do not count.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from precision_compiler.graph import aten, is_cast, is_view, shape_of, value_of


@dataclass(frozen=True)
class CrossEntropy:
    """A mean cross entropy that a graph computes and differentiates.

    Attributes:
        logits: (T, V).
        target: (T,), the index of the right word.
        grad: gradient of the loss, a single number.
        loss: the loss.
        change: gradient of the logits.
        ignore: value of ``target`` for tokens that do not count.
        inside: all nodes that compute loss and change from the others.
    """

    logits: fx.Node
    target: fx.Node
    grad: fx.Node
    loss: fx.Node
    change: fx.Node
    ignore: int
    inside: frozenset[fx.Node]


def cross_entropies(graph: fx.Graph) -> Iterator[CrossEntropy]:
    """Every mean cross entropy in a joint graph."""
    numbers = {node.args[1] for node in graph.find_nodes(op="call_function", target=aten.ne.Scalar)}
    picked = graph.find_nodes(op="call_function", target=aten.gather.default)
    shapes = {shape_of(node.args[0]) for node in picked}
    for ignore in sorted(number for number in numbers if isinstance(number, int)):
        for shape in sorted(shape for shape in shapes if len(shape) == 2):
            yield from _of_form(graph, _form(*shape, ignore), ignore)


def _of_form(graph: fx.Graph, form: fx.Graph, ignore: int) -> Iterator[CrossEntropy]:
    loss, change = _results(form)
    ends = graph.find_nodes(op="call_function", target=change.target)
    losses = graph.find_nodes(op="call_function", target=loss.target)
    for end in ends:
        for value in losses if shape_of(end) == shape_of(change) else ():
            comparison = _Comparison()
            if comparison.same(change, end) and comparison.same(loss, value):
                logits, target, grad = (
                    comparison.bound[x] for x in form.find_nodes(op="placeholder")
                )
                inside = frozenset(comparison.matched)
                yield CrossEntropy(logits, target, grad, value, end, ignore, inside)


def _results(form: fx.Graph) -> tuple[fx.Node, fx.Node]:
    results = form.output_node().args[0]
    assert isinstance(results, (list, tuple))
    loss, change = (_past_casts(node)[-1] for node in results if isinstance(node, fx.Node))
    return loss, change


@cache
def _form(tokens: int, words: int, ignore: int) -> fx.Graph:
    """Loss and gradient of the logits as torch decomposes them for Inductor."""

    def step(
        logits: torch.Tensor, target: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=ignore)
        (change,) = torch.autograd.grad(loss, logits, grad)
        return loss, change

    with FakeTensorMode(), torch.enable_grad():
        logits = torch.empty(tokens, words, requires_grad=True)
        target, grad = torch.empty(tokens, dtype=torch.int64), torch.empty(())
        return make_fx(step, select_decomp_table())(logits, target, grad).graph


class _Comparison:
    """Nodes of a form and of a graph that compute the same.

    Attributes:
        bound: what the form's placeholders stand for.
        matched: nodes of the graph that compute what the form does.
    """

    def __init__(self) -> None:
        self.bound: dict[fx.Node, fx.Node] = {}
        self.matched: set[fx.Node] = set()
        self._known: set[tuple[fx.Node, fx.Node]] = set()

    def same(self, form: fx.Node, node: fx.Node) -> bool:
        """Whether a node computes what one of the form does."""
        form, (*passed, node) = _past_casts(form)[-1], _past_casts(node)
        if form.op == "placeholder":
            return self.bound.setdefault(form, node) is node
        if (form, node) in self._known:
            return True
        if form.target != node.target or len(form.args) != len(node.args):
            return False
        rank = len(shape_of(node.all_input_nodes[0])) if node.all_input_nodes else 0
        pairs = zip(form.args, node.args, strict=True)
        if not all(self._same_argument(one, other, rank) for one, other in pairs):
            return False
        self._known.add((form, node))
        self.matched |= {node, *passed}
        return True

    def _same_argument(self, form: Any, argument: Any, rank: int) -> bool:
        if isinstance(form, fx.Node) and isinstance(argument, fx.Node):
            return self.same(form, argument)
        if isinstance(form, list) and isinstance(argument, list):  # dimensions, or sizes
            if not all(isinstance(one, int) for one in argument):
                return False  # a size that the capture leaves open
            return form == [one + rank if one < 0 else one for one in argument]
        return type(form) is type(argument) and bool(form == argument)


def _past_casts(node: fx.Node) -> list[fx.Node]:
    """A node and what it shows unchanged but for its rounding, down to what computes that."""
    chain = [node]
    while is_cast(chain[-1]) or _is_same_view(chain[-1]):
        parent = chain[-1].args[0]
        assert isinstance(parent, fx.Node)
        chain.append(parent)
    return chain


def _is_same_view(node: fx.Node) -> bool:
    if not is_view(node) or not isinstance(node.args[0], fx.Node):
        return False
    value, source = value_of(node), value_of(node.args[0])
    if value is None or source is None:
        return False
    return value.shape == source.shape and value.stride() == source.stride()
