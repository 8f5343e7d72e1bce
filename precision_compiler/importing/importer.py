"""An ONNX graph becomes an fx graph that computes the same, every node tagged with its origin.

One fx node stands for one ONNX node. What does not depend on data (weights, shapes on the given
batch and whatever is computed from them) is computed at once and enters as a constant.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import fx, nn

from precision_compiler.errors import OnnxImportError
from precision_compiler.importing.inputs import matched_inputs
from precision_compiler.importing.operator import Operator
from precision_compiler.importing.scopes import scope_of
from precision_compiler.importing.table import OPERATORS
from precision_compiler.importing.tensors import attribute_value, torch_tensor
from precision_compiler.origin import Origin, set_origin

OLDEST_OPSET, NEWEST_OPSET = 13, 24

_TORCH_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


@dataclass
class Imported:
    """An ONNX graph in torch, on the shapes of one batch.

    Attributes:
        module: one node per ONNX node; placeholders are constants and inputs; the results are
            the outputs that depend on data.
        arguments: value of every placeholder, weights being ``nn.Parameter``.
        names: ONNX name of every placeholder.
        constants: all that is known without data, by ONNX value.
        results: name of the first output of every node that depends on data, by the node's name.
        outputs: value of every output of the ONNX graph on the batch, by name.
        dtypes: element type of every value.
        sizes: shape of every value on the batch.
    """

    module: fx.GraphModule
    arguments: list[torch.Tensor]
    names: list[str]
    constants: dict[ir.Value, torch.Tensor]
    results: dict[str, str]
    outputs: dict[str, torch.Tensor]
    dtypes: dict[ir.Value, torch.dtype]
    sizes: dict[ir.Value, tuple[int, ...]]


@torch.no_grad()
def import_graph(model: ir.Model, batch: Mapping[str, torch.Tensor]) -> Imported:
    """Translate a graph on the shapes of a batch, and run it once on the way.

    Args:
        model: opset 13 to 24, functions inlined; its nodes have unique names.
        batch: a tensor for every input.

    Raises:
        OnnxImportError: an operator is not supported, an input is missing or of another type, or
            a shape depends on data; the message names the node.
    """
    version = model.opset_imports.get("", 0)
    if not OLDEST_OPSET <= version <= NEWEST_OPSET:
        raise OnnxImportError(
            f"the file has opset {version}, not {OLDEST_OPSET} to {NEWEST_OPSET}: convert it with "
            "onnx.version_converter"
        )
    builder = _Builder(model.graph)
    builder.place_inputs(batch)
    for node in model.graph:
        builder.place(node)
    return builder.finish()


@dataclass
class _Builder:
    graph: ir.Graph
    made: fx.Graph = field(default_factory=fx.Graph)
    constants: dict[ir.Value, torch.Tensor] = field(default_factory=dict)
    nodes: dict[ir.Value, fx.Node] = field(default_factory=dict)
    values: dict[ir.Value, torch.Tensor] = field(default_factory=dict)
    dtypes: dict[ir.Value, torch.dtype] = field(default_factory=dict)
    sizes: dict[ir.Value, tuple[int, ...]] = field(default_factory=dict)
    held: dict[ir.Value, fx.Node] = field(default_factory=dict)
    inputs: dict[ir.Value, torch.Tensor] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.graph.initializers.values():
            if value.const_value is not None:
                self._know(value, torch_tensor(value.const_value))
        uses = [value for node in self.graph for value in node.inputs if value is not None]
        self.waiting = Counter([*uses, *self.graph.outputs])

    def place_inputs(self, batch: Mapping[str, torch.Tensor]) -> None:
        """A placeholder for every input of the graph that is no initializer."""
        self.inputs = matched_inputs(self.graph, batch)
        for value, given in self.inputs.items():
            self._hold(value)
            self._record(value, self.held[value], given)

    def place(self, node: ir.Node) -> None:
        """Compute a node, as a constant where nothing in it depends on data."""
        row = _row_of(node)
        attributes = {name: attribute_value(one) for name, one in node.attributes.items()}
        attributes |= {"outputs": len(node.outputs)} if row.counts else {}
        read = [None if value is None else self._value(value) for value in node.inputs]
        known = [value is None or value in self.constants for value in node.inputs]
        arguments = [
            self._argument(node, row, place, value, known) if value is not None else None
            for place, value in enumerate(read)
        ]
        try:
            found = row.run(*arguments, **attributes)
        except OnnxImportError as error:
            raise OnnxImportError(f"{_label(node)}: {error}") from error
        except _TORCH_FAILURES as error:
            first = str(error).strip().splitlines()[:1]
            raise OnnxImportError(
                f"{_label(node)} cannot be computed: {first[0] if first else error!r}"
            ) from error
        several = found if isinstance(found, tuple) else (found,)
        if all(known) or row.of_shape:
            for value, result in zip(node.outputs, several, strict=False):
                self._know(value, result)
        else:
            self._call(node, row, arguments, attributes, several, isinstance(found, tuple))
        self._forget(node)

    def finish(self) -> Imported:
        """The graph with its outputs."""
        live = [value for value in self.graph.outputs if value in self.nodes]
        if not live:
            raise OnnxImportError("no output of the model depends on its inputs")
        self.made.output(tuple(self.nodes[value] for value in live))
        holders = list(self.held)
        arguments = [
            self.inputs[value] if value in self.inputs else _as_argument(self.constants[value])
            for value in holders
        ]
        outputs = {str(value.name): self._value(value) for value in self.graph.outputs}
        self.made.lint()
        return Imported(
            fx.GraphModule(nn.Module(), self.made), arguments,
            [str(value.name) for value in holders], self.constants, self.results, outputs,
            self.dtypes, self.sizes,
        )  # fmt: skip

    def _value(self, value: ir.Value) -> torch.Tensor:
        return self.constants[value] if value in self.constants else self.values[value]

    def _argument(
        self, node: ir.Node, row: Operator, place: int, value: torch.Tensor, known: Sequence[bool]
    ) -> Any:
        if place in row.static:
            if not known[place]:
                given = node.inputs[place]
                name = given.name if given is not None else f"number {place}"
                raise OnnxImportError(
                    f"{_label(node)}: its input {name} decides shapes and "
                    "depends on data, which is not supported: export with fixed shapes"
                )
            return value.tolist()
        if place in row.numbers and known[place] and value.dim() == 0:
            return value.item()
        return value

    def _call(
        self,
        node: ir.Node,
        row: Operator,
        arguments: Sequence[Any],
        attributes: Mapping[str, Any],
        results: Sequence[torch.Tensor],
        is_tuple: bool,
    ) -> None:
        unread = [value for value in node.outputs[len(results) :] if self.waiting[value]]
        if unread:
            raise OnnxImportError(f"{_label(node)}: its output {unread[0].name} is not supported")
        given = [
            self._placed(value) if isinstance(argument, torch.Tensor) and value is not None
            else argument
            for value, argument in zip(node.inputs, arguments, strict=True)
        ]  # fmt: skip
        call = self.made.call_function(row.run, tuple(given), dict(attributes))
        _tag(call, node)
        self.results[str(node.name)] = str(node.outputs[0].name)
        for index, (value, result) in enumerate(zip(node.outputs, results, strict=False)):
            one = call
            if is_tuple:
                one = self.made.call_function(_pick, (call, index))
                _tag(one, node)
            self._record(value, one, result)

    def _placed(self, value: ir.Value) -> fx.Node:
        """The fx node of a value; a constant becomes a placeholder when it is first read."""
        if value not in self.nodes and value not in self.held:
            self._hold(value)
        return self.nodes[value] if value in self.nodes else self.held[value]

    def _hold(self, value: ir.Value) -> None:
        last = next(reversed(self.held.values()), None)
        with self.made.inserting_after(last) if last else self.made.inserting_before():
            self.held[value] = self.made.placeholder(f"held_{len(self.held)}")

    def _know(self, value: ir.Value, tensor: torch.Tensor) -> None:
        self.constants[value], self.dtypes[value] = tensor, tensor.dtype
        self.sizes[value] = tuple(tensor.shape)

    def _record(self, value: ir.Value, node: fx.Node, tensor: torch.Tensor) -> None:
        self.nodes[value], self.values[value], self.dtypes[value] = node, tensor, tensor.dtype
        self.sizes[value] = tuple(tensor.shape)

    def _forget(self, node: ir.Node) -> None:
        """Free what nothing reads any more."""
        for value in node.inputs:
            if value is not None:
                self.waiting[value] -= 1
                if not self.waiting[value]:
                    self.values.pop(value, None)


def _pick(results: Sequence[Any], index: int) -> Any:
    return results[index]


def _as_argument(constant: torch.Tensor) -> torch.Tensor:
    if not constant.is_floating_point():
        return constant
    return nn.Parameter(constant, requires_grad=False)  # masks that do would bar fused attention


def _row_of(node: ir.Node) -> Operator:
    row = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if row is None:
        kind = node.op_type if not node.domain else f"{node.domain}.{node.op_type}"
        raise OnnxImportError(f"node {node.name}: the operator {kind} is not supported")
    return row


def _label(node: ir.Node) -> str:
    return f"node {node.name} ({node.op_type})"


def _tag(made: fx.Node, node: ir.Node) -> None:
    set_origin(made, Origin(str(node.name)))
    path = scope_of(node)
    made.meta["nn_module_stack"] = {path: (path, node.op_type)}
