"""Carries formats out in an ONNX file: casts, one per value and format, and narrow constants."""

from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as clean_up

from precision_compiler.annotate.onnx_file import OnnxFile
from precision_compiler.annotate.placement import FP32, Placement
from precision_compiler.annotate.schemas import (
    has_attribute,
    onnx_type,
    tied_inputs,
    tied_outputs,
)
from precision_compiler.formats import CHOICES

Describe = Callable[[ir.Node, str, str], dict[str, str]]
"""Metadata of a node that computes in one format and whose result has another."""

WIDE = ir.DataType.FLOAT
_SOFTMAX = "softmax_precision"


def rewrite_file(file: OnnxFile, placement: Placement, describe: Describe) -> None:
    """Rewrite a file in place.

    Inputs and outputs of the model keep their types.

    Args:
        file: the imported file.
        placement: which nodes compute in which format.
        describe: makes the metadata of a node, from its compute and its storage format.
    """
    _Rewriter(file, placement, describe).rewrite()
    clean_up.RemoveUnusedNodesPass()(file.model)


@dataclass
class _Rewriter:
    file: OnnxFile
    placement: Placement
    describe: Describe
    types: dict[ir.Value, str] = field(default_factory=dict)
    copies: dict[tuple[ir.Value, str], ir.Value] = field(default_factory=dict)
    casts: list[tuple[ir.Node, str]] = field(default_factory=list)

    def rewrite(self) -> None:
        graph = self.file.model.graph
        nodes, outputs = list(graph), list(graph.outputs)
        formats = {node: self._format(node) for node in reversed(nodes)}
        for node in nodes:
            self._serve(node, formats[node])
        for index, value in enumerate(outputs):
            if self.types.get(value, FP32) != FP32:
                self._restore_output(index, value)
        for node in nodes:
            stored = self.types.get(node.outputs[0], FP32)
            node.metadata_props.update(self.describe(node, formats[node] or FP32, stored))
        for cast, fmt in self.casts:
            cast.metadata_props.update(self.describe(cast, fmt, fmt))

    def _format(self, node: ir.Node) -> str | None:
        """The format a node computes in; None for one that takes whatever its input has."""
        if self._moves(node):
            wanted = {
                FP32 if reader is None else self.placement.compute.get(reader, FP32)
                for output in node.outputs
                for reader in self.file.readers(output)
            }
            return wanted.pop() if len(wanted) == 1 else None
        return self.placement.compute.get(node, FP32)

    def _moves(self, node: ir.Node) -> bool:
        return self.file.is_dynamic(node) and self.file.passes(node)

    def _serve(self, node: ir.Node, fmt: str | None) -> None:
        """Give a node its inputs in the format it computes in, and know its outputs' formats."""
        if self.file.tolerates(node):
            return
        opset = self.file.opset
        tied = tied_inputs(node, opset)
        if fmt is None:
            first = node.inputs[0]
            fmt = FP32 if first is None else self.types.get(first, FP32)
        for index, value in enumerate(node.inputs):
            if value is not None and self.file.is_float(value):
                wanted = fmt if index in tied else FP32
                node.replace_input_with(index, self._in_format(value, wanted))
        if fmt == FP32:
            return
        if has_attribute(node, opset, _SOFTMAX) and _SOFTMAX not in node.attributes:
            node.attributes.add(ir.AttrInt64(_SOFTMAX, WIDE))  # by default that of its inputs
        for index in tied_outputs(node, opset):
            value = node.outputs[index]
            if self.file.is_float(value):
                self.types[value] = fmt
                value.type = ir.TensorType(onnx_type(fmt))

    def _in_format(self, value: ir.Value, fmt: str) -> ir.Value:
        if self.types.get(value, FP32) == fmt:
            return value
        if (value, fmt) not in self.copies:
            folded = self._folded(value, fmt) if self.file.is_constant(value) else None
            self.copies[value, fmt] = self._cast(value, fmt) if folded is None else folded
        return self.copies[value, fmt]

    def _folded(self, value: ir.Value, fmt: str) -> ir.Value | None:
        """A constant as an initializer of its own; None where that makes the file larger."""
        tensor, dtype = self.file.imported.constants[value], CHOICES[fmt].dtype
        assert dtype is not None
        narrow = tensor.to(dtype)
        if narrow.nbytes > self._bytes_behind(value):
            return None
        name = f"{value.name}_{fmt}"
        held = ir.Value(name=name, type=ir.TensorType(onnx_type(fmt)), shape=ir.Shape(tensor.shape))
        held.const_value = ir.tensor_adapters.TorchTensor(narrow.contiguous(), name=name)
        self.file.model.graph.initializers.add(held)
        return held

    def _cast(self, value: ir.Value, fmt: str, output: ir.Value | None = None) -> ir.Value:
        dtype = onnx_type(fmt)
        name = f"{value.name}_{fmt}"
        made = output or ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape)
        node = ir.Node(
            "", "Cast", [value], [ir.AttrInt64("to", dtype)], outputs=[made], name=f"cast_{name}"
        )
        graph, producer = self.file.model.graph, value.producer()
        if producer is None:
            graph.insert_before(graph[0], node)
        else:
            graph.insert_after(producer, node)
        self.casts.append((node, fmt))
        return made

    def _restore_output(self, index: int, value: ir.Value) -> None:
        """Cast a narrow output back to float32, under its own name."""
        graph, name = self.file.model.graph, value.name
        value.name = f"{name}_{self.types[value]}"
        wide = self.copies.get((value, FP32)) or self._cast(value, FP32)
        wide.name = name
        self.copies[value, FP32] = wide
        graph.outputs[index] = wide

    def _bytes_behind(self, value: ir.Value) -> int:
        """Bytes of the constants that a value is computed from; 0 if shapes of data are in it."""
        seen, waiting, total = {value}, [value], 0
        for one in waiting:
            if not self.file.is_constant(one):
                return 0
            node = one.producer()
            if node is None or not node.inputs:
                total += self.file.imported.constants[one].nbytes
                continue
            new = [given for given in node.inputs if given is not None and given not in seen]
            seen.update(new)
            waiting += new
        return total
