"""Dimensions of a model's inputs that stay open in the exported file."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from precision_compiler.errors import ExportError
from precision_compiler.graph import aten
from precision_compiler.joint import JointGraph

Dynamic = Mapping[str, Mapping[int, str]]
"""Input name -> dimension -> name of its size."""


def named_tensors(model: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    """Every tensor of a batch by the model's own argument names."""
    if isinstance(batch, Mapping):
        given: dict[str, Any] = dict(batch)
    else:
        values = batch if isinstance(batch, Sequence) else (batch,)
        given = dict(inspect.signature(model.forward).bind(*values).arguments)
    found = {}
    for name, value in given.items():
        leaves = [
            leaf
            for leaf in torch.utils._pytree.tree_leaves(value)
            if isinstance(leaf, torch.Tensor)
        ]
        for index, leaf in enumerate(leaves):
            found[name if len(leaves) == 1 else f"{name}_{index}"] = leaf
    return found


def with_open_sizes(model: nn.Module, batch: Any, dynamic: Dynamic) -> Any:
    """A batch of the same values, marked so that a capture keeps the given sizes symbolic.

    Raises:
        ExportError: there is no such input or dimension, or its size is 0 or 1, which a capture
            cannot tell from a fixed one.
    """
    fresh = dict(batch) if isinstance(batch, Mapping) else batch
    fresh = torch.utils._pytree.tree_map(_alias, fresh)
    known = named_tensors(model, fresh)
    for name, sizes in dynamic.items():
        if name not in known:
            raise ExportError(f"there is no input {name!r} to keep open: name one of {[*known]}")
        for dimension, label in sizes.items():
            shape = tuple(known[name].shape)
            if not 0 <= dimension < len(shape):
                raise ExportError(f"input {name} of shape {shape} has no dimension {dimension}")
            if shape[dimension] < 2:
                raise ExportError(
                    f"input {name}: dimension {dimension} ({label}) is {shape[dimension]} in the "
                    "batch: export with a batch where it is 2 or more"
                )
            torch._dynamo.maybe_mark_dynamic(known[name], dimension)
    return fresh


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


def with_sizes_read(joint: JointGraph) -> JointGraph:
    """The graph with every size that it was given computed from one of its tensors, in place."""
    graph = joint.module.graph
    holders = graph.find_nodes(op="placeholder")
    kept = [isinstance(value, torch.Tensor) for value in joint.inputs]
    tensors = [node for node, keep in zip(holders, kept, strict=True) if keep]
    for node, keep in zip(holders, kept, strict=True):
        if keep:
            continue
        with graph.inserting_after(holders[-1]):
            source, dimension = _source_of(node, tensors)
            size = graph.call_function(aten.sym_size.int, (source, dimension))
        size.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(size)
        graph.erase_node(node)
    joint.module.recompile()
    pairs = list(zip(joint.names, joint.inputs, kept, strict=True))
    return replace(
        joint,
        names=[name for name, _, keep in pairs if keep],
        inputs=[value for _, value, keep in pairs if keep],
    )


def _source_of(size: fx.Node, tensors: Sequence[fx.Node]) -> tuple[fx.Node, int]:
    wanted = size.meta.get("val")
    expression = wanted.node.expr if isinstance(wanted, torch.SymInt) else None
    for node in tensors:
        for dimension, found in enumerate(node.meta["val"].shape):
            if isinstance(found, torch.SymInt) and found.node.expr == expression:
                return node, dimension
    raise ExportError(f"input {size.name} is no tensor and no size of one: make it a tensor")


def refuse_fixed(joint: JointGraph, names: Mapping[str, str], dynamic: Dynamic) -> None:
    """Check that the capture kept open what was asked for.

    Args:
        joint: the captured graph.
        names: placeholder -> input name.
        dynamic: what was asked for.

    Raises:
        ExportError: the model fixes a dimension, or does not read the input.
    """
    holders = joint.module.graph.find_nodes(op="placeholder")
    values = {names[node.name]: node.meta["val"] for node in holders if node.name in names}
    for name, sizes in dynamic.items():
        if name not in values:
            raise ExportError(f"the model does not read input {name}: leave it out of dynamic")
        for dimension, label in sizes.items():
            size = values[name].shape[dimension]
            if not isinstance(size, torch.SymInt):
                raise ExportError(
                    f"input {name}: this model works with a size of {size} alone in dimension "
                    f"{dimension} ({label}): leave it out of dynamic"
                )
