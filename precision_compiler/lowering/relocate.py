"""Look at a graph as a GPU would have it, on a machine without one."""

import operator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from precision_compiler.graph import aten, insert_call, refresh, shape_of
from precision_compiler.joint import JointGraph

_ON_CPU = aten._scaled_dot_product_flash_attention_for_cpu.default
_ON_CPU_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_ON_GPU = aten._scaled_dot_product_efficient_attention.default
_ON_GPU_BACKWARD = aten._scaled_dot_product_efficient_attention_backward.default


def on_gpu(joint: JointGraph) -> JointGraph:
    """A copy of a graph whose tensors claim to be on a GPU; they have sizes and no contents.

    Torch's own rules for devices (the layouts and sizes that scaled products take, for example)
    then hold for whatever passes put into it. Fused attention is the operation that torch takes
    for float32 on GPUs; with grouped heads, for which it has none, it stays the one on the CPU.
    """
    copy = joint.copy()
    graph = copy.module.graph
    for node in graph.nodes:
        node.args = torch.utils._pytree.tree_map(_with_gpu, node.args)
        node.kwargs = torch.utils._pytree.tree_map(_with_gpu, node.kwargs)
        if "val" in node.meta:
            node.meta["val"] = torch.utils._pytree.tree_map(_moved, node.meta["val"])
    state: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=_ON_CPU):
        if shape_of(node.args[0])[1] == shape_of(node.args[1])[1]:
            state[node] = _forward_on_gpu(node)
    for node in graph.find_nodes(op="call_function", target=_ON_CPU_BACKWARD):
        if shape_of(node.args[1])[1] == shape_of(node.args[2])[1]:
            _backward_on_gpu(node, state)
    copy.module.recompile()
    return copy


def _moved(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    elements = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return FakeTensor(value.fake_mode, elements, torch.device("cuda"))


def _with_gpu(argument: Any) -> Any:
    return torch.device("cuda") if isinstance(argument, torch.device) else argument


def _forward_on_gpu(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Change a forward attention; returns its random state, which the backward one reads."""
    query, key, value, *options = node.args
    dropout = options[0] if options else 0.0
    causal = options[1] if len(options) > 1 else False
    mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    node.target = _ON_GPU
    node.args = (query, key, value, mask, True, dropout, causal)
    node.kwargs = {"scale": scale}
    refresh(node)
    for result in node.users:
        refresh(result)
    seed, offset = (
        insert_call(node.graph, operator.getitem, (node, index), after=node, like=node)
        for index in (2, 3)
    )
    return seed, offset


def _backward_on_gpu(node: fx.Node, state: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
    grad, query, key, value, out, logsumexp, dropout, causal = node.args
    assert isinstance(logsumexp, fx.Node)
    assert isinstance(logsumexp.args[0], fx.Node)
    mask, scale = node.kwargs.get("attn_mask"), node.kwargs.get("scale")
    wanted = [True, True, True, False]
    seed, offset = state[logsumexp.args[0]]
    node.target = _ON_GPU_BACKWARD
    node.args = (
        grad, query, key, value, mask, out, logsumexp, seed, offset, dropout, wanted, causal
    )  # fmt: skip
    node.kwargs = {"scale": scale}
    refresh(node)
    for result in node.users:
        refresh(result)
