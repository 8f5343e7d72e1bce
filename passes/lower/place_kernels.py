"""See PlaceKernels."""

import operator
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler import packing
from precision_compiler.facts import NodeFacts, facts_of, set_facts
from precision_compiler.graph import (
    Mover,
    aten,
    insert_call,
    is_cast,
    is_view,
    made_by,
    root_of,
    shape_of,
    uses_past_movement,
    value_of,
)
from precision_compiler.kernels import supports
from precision_compiler.lowering.products import SIXTEEN_BITS
from precision_compiler.lowering.recognise import Activation, Norm, recognise
from precision_compiler.pipeline import Numerics, Unit

NORM = torch.ops.precision_compiler.norm_quantise.default
ACTIVATION = torch.ops.precision_compiler.activation_quantise.default
BLOCK = 32


@dataclass(frozen=True)
class PlaceKernels:
    """Let one kernel normalise or activate a tensor and quantise it, where that moves fewer bytes.

    It reads the input once and writes the operands of products: rows in blocks along the columns
    for the forward product, and transposed in blocks along the rows for the weight's gradient.
    Inductor takes a kernel for the result and one per orientation, as blocks are reductions of
    their own.

    1. Only MXFP8 operands of float32 numbers, on a GPU whose kernel is proved to be native.
    2. The tensor is recognised by what it computes: LayerNorm, RMSNorm, GELU with the error
       function, SwiGLU. A rounding between it and its quantisation is left out: one rounding
       less than planned.
    3. Both sizes of the matrix divide into blocks, so that nothing has to be filled up.
    4. Its bytes are fewer than those of the kernels that it replaces.
    """

    name: ClassVar[str] = "place-kernels"
    reads: ClassVar[frozenset[str]] = frozenset()
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Place kernels; note in the journal where, what it saves, and why not elsewhere."""
        graph = unit.joint.module.graph
        readers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for call in graph.find_nodes(op="call_function", target=packing.block_operand):
            if call.args[1] == "mxfp8":
                readers[made_by(call.args[0])].append(call)
        reasons = Counter(
            _place(graph, made, calls, unit.architecture) for made, calls in readers.items()
        )
        placed = reasons.pop("", 0)
        if placed:
            note = f"{placed} tensors are quantised by the kernel that makes them"
            unit.journal.note(self.name, note)
        for reason, count in reasons.items():
            unit.journal.note(self.name, f"{count} tensors are quantised apart: {reason}")
        return placed > 0


@dataclass(frozen=True)
class _Form:
    """A kernel's call for a tensor.

    Attributes:
        kernel: its name.
        operation: its operator; results 0 to 3 are rows, their codes, columns and their codes.
        tensors: what it reads, in the shape of the result.
        rest: the further arguments.
    """

    kernel: str
    operation: Any
    tensors: tuple[fx.Node, ...]
    rest: tuple[Any, ...]


def _place(graph: fx.Graph, made: fx.Node, calls: Sequence[fx.Node], architecture: str) -> str:
    """Replace the quantisations of a tensor; return why not, or nothing."""
    found = recognise(made)
    if found is None:
        return "what makes them is no normalisation or activation that a kernel has"
    form = _form_of(found)
    rows, columns = _matrix(made)
    if not (support := supports(architecture, form.kernel, "mxfp8")):
        return support.reason
    if rows % BLOCK or columns % BLOCK:
        return f"{rows} x {columns} does not divide into blocks of {BLOCK} both ways"
    if not all(map(_is_contiguous, form.tensors)):
        return "what they are made from does not lie row by row"
    if any(_orientation(call, made) is None for call in calls):
        return "a product reads them in another order than they are made in"
    if _saved_bytes(form, made, calls) <= 0:
        return "the kernel would move no fewer bytes"
    _replace(graph, form, made, calls)
    return ""


def _form_of(found: Norm | Activation) -> _Form:
    if isinstance(found, Norm):
        rest = (found.weight, found.bias, found.eps, found.centred, "e4m3", "mx")
        return _Form("norm_quantise", NORM, (found.x,), rest)
    tensors = tuple(x for x in (found.x, found.up) if x is not None)
    return _Form("activation_quantise", ACTIVATION, tensors, (None, "e4m3"))


def _stored(node: fx.Node) -> fx.Node:
    """What is in memory of a tensor: where it was only widened to compute with, its source."""
    root = root_of(node)
    source = root.args[0] if is_cast(root) else None
    value = value_of(source) if isinstance(source, fx.Node) else None
    if isinstance(source, fx.Node) and value is not None and value.dtype in SIXTEEN_BITS:
        return source
    return root


def _matrix(made: fx.Node) -> tuple[int, int]:
    *leading, columns = shape_of(made)
    return prod(leading), columns


def _orientation(call: fx.Node, made: fx.Node) -> int | None:
    """0 for rows, 2 for columns: the kernel's results that an operand is; None for neither."""
    operand, _, is_right, *_ = call.args
    assert isinstance(operand, fx.Node)
    node, value = operand, value_of(operand)
    while is_view(node) or is_cast(node):
        assert isinstance(node.args[0], fx.Node)
        node = node.args[0]
    rows, columns = _matrix(made)
    if node is not made or value is None or not _is_contiguous(made):
        return None
    layout = shape_of(operand), tuple(value.stride())
    as_made, turned = ((rows, columns), (columns, 1)), ((columns, rows), (1, columns))
    if layout not in (as_made, turned):
        return None
    return 2 * ((layout == turned) ^ bool(is_right))


def _is_contiguous(node: fx.Node) -> bool:
    value = value_of(node)
    return value is not None and value.is_contiguous()


def _saved_bytes(form: _Form, made: fx.Node, calls: Sequence[fx.Node]) -> float:
    """Bytes that the kernel spares: what it replaces reads and writes, less what it does."""
    elements = prod(shape_of(made))
    read = sum(_width(tensor) * elements for tensor in form.tensors)
    written = (1 + 1 / BLOCK) * elements
    operands = [call.args[0] for call in calls]
    kept = max(_width(operand) for operand in operands if isinstance(operand, fx.Node))
    apart = read + kept * elements + len(calls) * (kept * elements + written)
    again = read + kept * elements if _has_other_readers(made, calls) else 0.0
    return apart - (read + 2 * written + again)


def _width(node: fx.Node) -> int:
    """Bytes of an element as it is stored."""
    value = value_of(_stored(node))
    assert value is not None
    return value.element_size()


def _has_other_readers(made: fx.Node, calls: Sequence[fx.Node]) -> bool:
    shown = [made]
    for node in shown:
        shown += [user for user, _ in uses_past_movement(node) if is_cast(user)]
    users = {user for node in shown for user, _ in uses_past_movement(node)}
    return bool(users - set(calls) - set(shown))


def _replace(graph: fx.Graph, form: _Form, made: fx.Node, calls: Sequence[fx.Node]) -> None:
    rows, columns = _matrix(made)
    mover = Mover(graph)
    narrow = [mover.moved(_stored(x), root_of(x), x) for x in form.tensors]
    matrices = [
        insert_call(graph, aten.view.default, (x, [rows, columns]), after=x, like=made)
        for x in narrow
    ]
    filled = [*matrices, None] if form.kernel == "activation_quantise" else matrices
    nodes = [x for x in (*matrices, *form.rest) if isinstance(x, fx.Node)]
    args = (*filled[:2], *form.rest)
    kernel = insert_call(graph, form.operation, args, after=max(nodes), like=made)
    facts = facts_of(made)
    if facts is not None:
        name = f"{facts.name}.{form.kernel}"
        set_facts(kernel, NodeFacts(name, None, "computed and quantised by one kernel"))
    for call in calls:
        start = _orientation(call, made)
        assert start is not None
        elements, codes = (
            insert_call(graph, operator.getitem, (kernel, start + i), after=kernel, like=made)
            for i in (0, 1)
        )
        function = packing.blocked_scales if call.args[3] else packing.row_scales
        scales = insert_call(graph, function, (codes,), after=codes, like=made)
        whole = insert_call(graph, packing.no_scale, (codes,), after=codes, like=made)
        for part in list(call.users):
            index = part.args[1]
            assert isinstance(index, int)
            part.replace_all_uses_with((elements, scales, whole)[index])
            graph.erase_node(part)
        graph.erase_node(call)
