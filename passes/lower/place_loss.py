"""See PlaceLoss."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, prod
from operator import getitem
from typing import ClassVar

import torch
from torch import fx

from precision_compiler.facts import NodeFacts, facts_of, set_facts
from precision_compiler.graph import (
    aten,
    insert_call,
    is_cast,
    is_view,
    made_by,
    shape_of,
    value_of,
)
from precision_compiler.kernels import supports
from precision_compiler.kernels.cross_entropy import CHUNK
from precision_compiler.lowering.cross_entropy import CrossEntropy, cross_entropies
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.target import Target

LOSS = torch.ops.precision_compiler.linear_cross_entropy.default
BACKWARD = torch.ops.precision_compiler.linear_cross_entropy_backward.default


@dataclass(frozen=True)
class PlaceLoss:
    """Let one kernel compute logits and their cross entropy, where that is faster.

    It never stores logits: the backward pass computes them again, which is one product more,
    while writing them and reading them twice is spared.

    1. The loss is recognised by comparing with torch's own decomposition of it.
    2. Its logits are a product without bias of two bf16 matrices, read by the loss alone; the two
       products with their gradient are in bf16 too.
    3. On a GPU whose kernel is proved to be native, if the target is predicted to take less time.
       A rounding of the logits or inside the loss is left out: fewer roundings than planned.
    """

    name: ClassVar[str] = "place-loss"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Place the kernel; note in the journal what it spares, or why it is not there."""
        if not unit.architecture or unit.joint.inference:
            return False
        graph, placed = unit.joint.module.graph, False
        for loss in list(cross_entropies(graph)):
            found = _products(loss)
            reason = found if isinstance(found, str) else _reason_against(found, unit)
            if isinstance(found, _Products) and not reason:
                _replace(graph, loss, found)
                placed, reason = True, f"{_bytes(found):.3g} bytes of logits are never stored"
            unit.journal.note(self.name, f"the loss of {_name(loss)}: {reason}")
        return placed


@dataclass(frozen=True)
class _Products:
    """The three products around a loss.

    Attributes:
        forward: hidden (T, D) times the weight's transpose (D, V).
        hidden_grad: the logits' gradient times the weight, (T, D).
        weight_grad: the weight's gradient, (V, D) or transposed.
    """

    forward: fx.Node
    hidden_grad: fx.Node
    weight_grad: fx.Node


def _products(loss: CrossEntropy) -> _Products | str:
    """The products, or why the kernel cannot take their place."""
    chain = list(_to_product(loss.logits))
    forward = chain[-1]
    if forward.target is not aten.mm.default or len(forward.all_input_nodes) != 2:
        return "its logits are no plain product of two 16-bit matrices"
    known = {*chain, *loss.inside}
    if any(user not in known for node in known - {loss.loss, loss.change} for user in node.users):
        return "something else reads its logits, which are stored for that anyway"
    readers = list(_readers(loss.change))
    hidden, weight = (made_by(argument) for argument in forward.all_input_nodes)
    tokens = shape_of(forward)[0]
    found: dict[bool, fx.Node] = {}
    for reader in readers:
        others = {made_by(argument) for argument in reader.all_input_nodes}
        is_hidden = shape_of(reader)[0] == tokens and weight in others
        if reader.target is aten.mm.default and (is_hidden or hidden in others):
            found[is_hidden] = reader
    whole = len(found) == 2 and shape_of(found[True]) == shape_of(forward.all_input_nodes[0])
    if len(readers) != 2 or not whole:
        return "its gradient is not read by two plain products, of the weight and of its input"
    products = _Products(forward, found[True], found[False])
    every = (products.forward, products.hidden_grad, products.weight_grad)
    if any(not _is_bf16(node) for node in every):
        return "its three products are not all in bf16"
    return products


def _to_product(logits: fx.Node) -> Iterator[fx.Node]:
    """From logits up to what computes them, through roundings and views in the same order."""
    yield logits
    parent = logits.args[0] if is_cast(logits) or is_view(logits) else None
    if isinstance(parent, fx.Node) and _same_rows(logits, parent):
        yield from _to_product(parent)


def _same_rows(view: fx.Node, source: fx.Node) -> bool:
    """Whether two tensors hold the same elements in the same order: a slice holds fewer."""
    values = [value_of(view), value_of(source)]
    in_rows = all(value is not None and value.is_contiguous() for value in values)
    return in_rows and prod(shape_of(view)) == prod(shape_of(source))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a tensor, past roundings and views."""
    for user in node.users:
        if is_cast(user) or is_view(user):
            yield from _readers(user)
        else:
            yield user


def _is_bf16(product: fx.Node) -> bool:
    values = [value_of(node) for node in (product, *product.all_input_nodes)]
    return all(value is not None and value.dtype == torch.bfloat16 for value in values)


def _reason_against(products: _Products, unit: Unit) -> str:
    """Why the kernel would not be there, or take longer; empty if it pays."""
    if not (support := supports(unit.architecture, "linear_cross_entropy", "bf16")):
        return support.reason
    if unit.machine is None:
        return "the target's speed is not known here"
    again, spared = _seconds(products, unit.machine)
    if spared > again:
        return ""
    return (
        f"computing logits again takes {again:.2g} s, writing and reading them {spared:.2g} s; "
        f"it would keep {_bytes(products):.3g} bytes fewer"
    )


def _seconds(products: _Products, target: Target) -> tuple[float, float]:
    """What the kernel adds, and what it spares.

    Added: the product once more, without writing its result, and the sum of the hidden states'
    gradients over the chunks of the vocabulary, in float32. Spared: logits, written once and read
    by the loss and by its gradient.
    """
    (tokens, words), depth = shape_of(products.forward), shape_of(products.hidden_grad)[1]
    logits = _bytes(products)
    product = target.gemm_seconds(tokens, words, depth, format="bf16", quantise=False)
    sums = ceil(words / CHUNK) * tokens * depth * 4
    again = max(0.0, product - target.write_seconds(logits))
    again += 2 * target.read_seconds(sums) + target.write_seconds(sums)
    return again, target.write_seconds(logits) + 2 * target.read_seconds(logits)


def _bytes(products: _Products) -> float:
    tokens, words = shape_of(products.forward)
    return 2.0 * tokens * words


def _name(loss: CrossEntropy) -> str:
    facts = facts_of(loss.loss)
    return facts.name if facts is not None else loss.loss.name


def _replace(graph: fx.Graph, loss: CrossEntropy, products: _Products) -> None:
    hidden, turned = products.forward.args
    assert isinstance(hidden, fx.Node)
    assert isinstance(turned, fx.Node)
    latest = max(products.forward, loss.target)
    weight = insert_call(graph, aten.t.default, (turned,), after=latest, like=products.forward)
    given = hidden, weight, loss.target
    forward = insert_call(graph, LOSS, (*given, loss.ignore), after=weight, like=products.forward)
    value, total = _results(graph, forward)
    set_facts(forward, NodeFacts(f"{_name(loss)}.linear_cross_entropy", None, "logits not stored"))
    loss.loss.replace_all_uses_with(value)
    first = min(products.hidden_grad, products.weight_grad)
    args = (loss.grad, *given, total, loss.ignore)
    backward = insert_call(graph, BACKWARD, args, after=first.prev, like=first)
    hidden_grad, weight_grad = _results(graph, backward)
    if shape_of(products.weight_grad) != shape_of(weight_grad):
        weight_grad = insert_call(
            graph, aten.t.default, (weight_grad,), after=weight_grad, like=first
        )
    products.hidden_grad.replace_all_uses_with(hidden_grad)
    products.weight_grad.replace_all_uses_with(weight_grad)


def _results(graph: fx.Graph, call: fx.Node) -> tuple[fx.Node, fx.Node]:
    first, second = (
        insert_call(graph, getitem, (call, index), after=call, like=call) for index in (0, 1)
    )
    return first, second
