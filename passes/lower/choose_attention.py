"""See ChooseAttention."""

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler.facts import facts_of, set_facts
from precision_compiler.graph import aten, has_open_sizes, insert_call, root_of, shape_of, value_of
from precision_compiler.lowering.products import FLASH, FLASH_BACKWARD, SIXTEEN_BITS
from precision_compiler.pipeline import Numerics, Unit

_EFFICIENT = aten._scaled_dot_product_efficient_attention.default
_EFFICIENT_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default
_WIDEST_HEAD = 256
_HEAD_MULTIPLE = 8


@dataclass(frozen=True)
class ChooseAttention:
    """Let fused attention that a plan has in 16 bits run on FlashAttention's kernels.

    A float32 model is captured with torch's memory-efficient attention, the only fused one that
    takes float32 on GPUs; in 16 bits torch itself would choose FlashAttention before it.

    1. All operands have one dtype of 16 bits, forward and in every backward pass of it: the two
       kernels hand each other a normaliser in a layout of their own.
    2. No bias and no dropout: FlashAttention takes no bias, and draws other random numbers.
    3. Heads are a multiple of 8 wide, at most 256; key and value have as many of them as query.
    """

    name: ClassVar[str] = "choose-attention"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Replace the operations; note in the journal what stays, and why."""
        graph = unit.joint.module.graph
        backward_of = defaultdict[object, list[fx.Node]](list)
        for one in graph.find_nodes(op="call_function", target=_EFFICIENT_BACKWARD):
            backward_of[_forward_of(one)].append(one)
        changed = False
        for node in graph.find_nodes(op="call_function", target=_EFFICIENT):
            if _dtype(node.args[0]) not in SIXTEEN_BITS:
                continue
            backward = backward_of[node]
            reason = _reason(node, backward)
            if not reason:
                _replace(node, backward)
                changed = True
            else:
                facts = facts_of(node)
                name = facts.name if facts is not None else node.name
                unit.journal.note(self.name, f"{name} keeps memory-efficient attention: {reason}")
        return changed


def _forward_of(backward: fx.Node) -> object:
    """The operation whose normaliser a backward one reads."""
    logsumexp = backward.args[6]
    assert isinstance(logsumexp, fx.Node)
    return root_of(logsumexp).args[0]


def _reason(node: fx.Node, backward: Sequence[fx.Node]) -> str:
    operands = [*node.args[:3], *(operand for one in backward for operand in one.args[:4])]
    dtypes = {_dtype(operand) for operand in operands}
    if len(dtypes) > 1:
        return "forward and backward pass are in different formats"
    if node.args[3] is not None:
        return "it has a bias"
    if node.args[5]:
        return "it has dropout"
    query, key = (shape_of(operand) for operand in node.args[:2] if isinstance(operand, fx.Node))
    if query[-1] % _HEAD_MULTIPLE or query[-1] > _WIDEST_HEAD:
        return f"heads of {query[-1]} are no multiple of {_HEAD_MULTIPLE} up to {_WIDEST_HEAD}"
    if query[1] != key[1]:
        return "key and value have fewer heads than query"
    inputs = [operand for operand in node.args[:2] if isinstance(operand, fx.Node)]
    return "its sizes are open" if any(map(has_open_sizes, inputs)) else ""


def _dtype(operand: Any) -> torch.dtype | None:
    value = value_of(operand) if isinstance(operand, fx.Node) else None
    return None if value is None else value.dtype


def _replace(node: fx.Node, backward: Sequence[fx.Node]) -> None:
    graph, causal, scale = node.graph, node.args[6], {"scale": node.kwargs.get("scale")}
    args = (*node.args[:3], 0.0, causal, False)
    flash = insert_call(graph, FLASH, args, scale, after=node, like=node)
    results = {index: _result(flash, index) for index in (0, 1, 6, 7)}
    lengths = [shape_of(operand)[2] for operand in node.args[:2] if isinstance(operand, fx.Node)]
    for one in backward:
        given = (*one.args[:4], one.args[5], results[1], None, None, *lengths)
        rest = (0.0, causal, results[6], results[7])
        made = insert_call(graph, FLASH_BACKWARD, (*given, *rest), scale, after=one, like=one)
        _take_over(one, made)
    for user in list(node.users):
        index = user.args[1]
        if index in (0, 1) and isinstance(index, int):
            facts = facts_of(user)
            user.replace_all_uses_with(results[index])
            if facts is not None:
                set_facts(results[index], facts)
    _name_alike(node, flash)
    for old in (*backward, node):
        _erase(old)


def _erase(node: fx.Node) -> None:
    """Erase an operation and its results; torch itself keeps whatever draws random numbers."""
    for user in list(node.users):
        if not user.users:
            node.graph.erase_node(user)
    node.graph.erase_node(node)


def _result(node: fx.Node, index: int) -> fx.Node:
    return insert_call(node.graph, operator.getitem, (node, index), after=node, like=node)


def _take_over(old: fx.Node, new: fx.Node) -> None:
    """Let everything that read the gradients of one operation read those of another."""
    _name_alike(old, new)
    for user in list(old.users):
        if user.args[1] in (0, 1, 2):  # 3 would be that of a bias, and there is none
            user.replace_input_with(old, new)


def _name_alike(old: fx.Node, new: fx.Node) -> None:
    facts = facts_of(old)
    if facts is not None:
        set_facts(new, facts)
