"""Prepare the rounding of operands for export: what ONNX has, where a compiler looks for it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from precision_compiler.emulation import EMULATED_ATTENTION, QUANTISE
from precision_compiler.errors import ExportError
from precision_compiler.facts import facts_of, set_facts
from precision_compiler.formats import CHOICES, largest_magnitude
from precision_compiler.graph import (
    Mover,
    contraction_rule,
    insert_call,
    root_of,
    shape_of,
    uses_past_movement,
    value_of,
)
from precision_compiler.scaling import SCALED_FORMATS
from precision_compiler.sites import rounded_arguments

_INEXPRESSIBLE = frozenset(
    name for name, row in SCALED_FORMATS.items() if row.element.name in ("e2m3", "e3m2")
)
"""ONNX has their elements from opset 28 on, which no runtime has."""

_SMALLEST_SCALE = 2.0**-126  # float32's smallest normal number


def prepare_rounding(module: fx.GraphModule, values: Sequence[Any]) -> None:
    """Give every emulating operation of a graph its exported form.

    tf32 operands are float32 in memory and need no operation: the node's annotation says what
    the hardware makes of them. Formats with one scale per tensor get a fixed one, from the
    largest magnitude on the batch, and are rounded behind all views, right before the product.

    Args:
        module: the rewritten graph.
        values: of its placeholders, on the batch that scales are taken from.

    Raises:
        ExportError: a format has no ONNX form; names the site.
    """
    graph = module.graph
    _plain_attention(graph)
    for node in graph.find_nodes(op="call_function", target=QUANTISE):
        if node.args[1] == "tf32":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        else:
            _refuse_inexpressible(node)
    module.recompile()
    _fix_scales(module, values)
    _round_last(graph)
    graph.lint()
    module.recompile()


def is_scaled_per_tensor(node: fx.Node) -> bool:
    """Whether a node rounds a tensor under one scale."""
    return node.target is QUANTISE and not CHOICES[str(node.args[1])].by_axis


def _plain_attention(graph: fx.Graph) -> None:
    """What attention rounds inside has no ONNX operation."""
    plain = {emulated: target for target, emulated in EMULATED_ATTENTION.items()}
    for node in graph.nodes:
        if node.target in plain:
            *args, mask, scale, _ = node.args
            node.target, node.args = plain[node.target], tuple(args)
            node.kwargs = {"attn_mask": mask, "scale": scale}


def _refuse_inexpressible(node: fx.Node) -> None:
    source, name, *rest = node.args
    assert isinstance(source, fx.Node)
    fmt, value = CHOICES[str(name)], value_of(source)
    if name in _INEXPRESSIBLE:
        raise ExportError(
            f"{_site_of(node)}: {name} needs ONNX opset 28, which no runtime has: override the "
            "site's format, or make a plan for a target without it"
        )
    row = SCALED_FORMATS.get(str(name))
    if row is not None and rest[2:] == ["weight"] and row.weight_scaling is not None:
        raise ExportError(
            f"{_site_of(node)}: {name} scales weights in square blocks, which ONNX has no form "
            f"for: override the site's format, with {row.base} for instance"
        )
    assert value is not None
    summed = rest[0] if rest else None
    length = value.shape[summed] if fmt.block and isinstance(summed, int) else 0
    if isinstance(length, torch.SymInt) or (length and length % fmt.block):
        said = "an open dimension" if isinstance(length, torch.SymInt) else f"{length} elements"
        raise ExportError(
            f"{_site_of(node)}: a sum over {said} does not divide into the blocks of {fmt.block} "
            f"of {name}: export with a fixed multiple of it, or override the site's format"
        )


def _site_of(node: fx.Node) -> str:
    facts = [facts_of(user) for user, _ in uses_past_movement(node)]
    return next((known.site for known in facts if known and known.site), node.name)


class _Watch(fx.Interpreter):
    """Runs a graph and notes the largest magnitude of what each scaled rounding is given."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.amax: dict[fx.Node, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if is_scaled_per_tensor(n):
            assert isinstance(n.args[0], fx.Node)
            self.amax[n] = largest_magnitude(self.env[n.args[0]])
        return super().run_node(n)


def _fix_scales(module: fx.GraphModule, values: Sequence[Any]) -> None:
    if not any(map(is_scaled_per_tensor, module.graph.nodes)):
        return
    watch = _Watch(module)
    with torch.no_grad():
        watch.run(*values)
    for node, amax in watch.amax.items():
        smallest = CHOICES[str(node.args[1])].max_finite * _SMALLEST_SCALE if amax else 0.0
        node.args = (node.args[0], node.args[1], -1, max(amax, smallest))


def _round_last(graph: fx.Graph) -> None:
    """Move views from behind a rounding under a fixed scale to before it, which is the same.

    Compilers recognise a product of quantised operands only where it reads them directly. A view
    that repeats elements stays behind.
    """
    mover, made = Mover(graph), dict[fx.Node, fx.Node]()
    for node in [node for node in graph.nodes if contraction_rule(node)]:
        for index, argument in rounded_arguments(node).items():
            if _may_swap(argument):
                if argument not in made:
                    made[argument] = _rounded_view(graph, mover, argument)
                node.update_arg(index, made[argument])
    for node in reversed(graph.find_nodes(op="call_function", target=QUANTISE)):
        _erase_unread(node)


def _may_swap(argument: fx.Node) -> bool:
    base = root_of(argument)
    sizes = [torch.Size(shape_of(node)).numel() for node in (argument, base)]
    return argument is not base and is_scaled_per_tensor(base) and sizes[0] <= sizes[1]


def _rounded_view(graph: fx.Graph, mover: Mover, argument: fx.Node) -> fx.Node:
    base = root_of(argument)
    source, *how = base.args
    assert isinstance(source, fx.Node)
    moved = mover.moved(source, base, argument)
    rounded = insert_call(graph, QUANTISE, (moved, *how), after=moved, like=base)
    facts = facts_of(base)
    if facts is not None:
        set_facts(rounded, facts)
    return rounded


def _erase_unread(node: fx.Node) -> None:
    """Erase a node of which only views are left that nobody reads, and these."""
    for user in list(node.users):
        _erase_unread(user)
    if not node.users and node.op == "call_function":
        node.graph.erase_node(node)
