"""An imported ONNX file and what its analysis found: who makes, passes on and reads each value."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir
import torch

from precision_compiler.annotate.schemas import admits, reads
from precision_compiler.formats import CHOICES
from precision_compiler.graph import contraction_rule
from precision_compiler.importing import Imported
from precision_compiler.joint import JointGraph
from precision_compiler.origin import origin_of
from precision_compiler.sites import Site

NARROW = ("bf16", "fp16")
"""Formats that a file holds by casts alone."""


@dataclass(frozen=True)
class OnnxFile:
    """A file between its import and its rewriting.

    Attributes:
        model: the file.
        imported: its translation.
        joint: that as captured.
    """

    model: ir.Model
    imported: Imported
    joint: JointGraph

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return self.model.opset_imports[""]

    @cached_property
    def products(self) -> Mapping[str, list[Site]]:
        """Contraction sites by the name of the ONNX node they belong to."""
        nodes = {node.name: node for node in self.joint.module.graph.nodes}
        found: dict[str, list[Site]] = {}
        for site in self.joint.sites:
            origin = origin_of(nodes[site.node])
            if site.kind == "contraction" and origin is not None:
                found.setdefault(origin.node, []).append(site)
        return found

    @cached_property
    def stores(self) -> Mapping[str, Site]:
        """Storage sites by the name of the ONNX value they decide on."""
        nodes = {node.name: node for node in self.joint.module.graph.nodes}
        origins = {site: origin_of(nodes[site.node]) for site in self.joint.sites}
        return {
            origin.value: site
            for site, origin in origins.items()
            if site.kind == "storage" and origin is not None and origin.value is not None
        }

    @cached_property
    def _made(self) -> frozenset[str]:
        origins = (origin_of(node) for node in self.joint.module.graph.nodes)
        return frozenset(origin.value for origin in origins if origin and origin.value)

    @cached_property
    def _products_made(self) -> frozenset[str]:
        """ONNX nodes with a contraction in them, whether its format is open or not."""
        graph = self.joint.module.graph
        found = (origin_of(node) for node in graph.nodes if contraction_rule(node) is not None)
        return frozenset(origin.node for origin in found if origin is not None)

    def is_constant(self, value: ir.Value) -> bool:
        """Whether a value is known without data."""
        return value in self.imported.constants

    def is_float(self, value: ir.Value | None) -> bool:
        """Whether a value is float32 in the original file."""
        return value is not None and self.imported.dtypes.get(value) == torch.float32

    def is_dynamic(self, node: ir.Node) -> bool:
        """Whether a node depends on data."""
        return any(value not in self.imported.constants for value in node.outputs)

    def passes(self, node: ir.Node) -> bool:
        """Whether a node only moves the elements of its first input, in whatever type."""
        first = node.inputs[0] if node.inputs else None
        if not self.is_float(first) or not self.is_float(node.outputs[0]):
            return False
        made = node.outputs[0].name in self._made or node.name in self._products_made
        return not made and all(admits(node, self.opset, fmt) for fmt in NARROW)

    def tolerates(self, node: ir.Node) -> bool:
        """Whether a node reads its only float input in whatever format, and returns none.

        Such as a test for NaN, or a look at the shape alone.
        """
        if not self.is_dynamic(node):
            return True
        floats = [value for value in node.inputs if self.is_float(value)]
        returns = any(self.is_float(value) for value in node.outputs)
        return len(floats) == 1 and not returns and reads(node, self.opset, NARROW)

    def selects(self, node: ir.Node) -> bool:
        """Whether a node picks elements of one constant: rounding before it is rounding after."""
        floats = [value for value in node.inputs if self.is_float(value)]
        return len(floats) == 1 and floats[0] is not None and self.is_constant(floats[0])

    def root(self, value: ir.Value) -> ir.Value:
        """The value whose elements this one shows."""
        node = value.producer()
        while node is not None and self.is_dynamic(node) and self.passes(node):
            first = node.inputs[0]
            assert first is not None
            value, node = first, first.producer()
        return value

    def readers(self, root: ir.Value) -> Iterator[ir.Node | None]:
        """Nodes that compute with a value's elements and want them in a format of theirs.

        None stands for an output of the model.
        """
        if root.is_graph_output():
            yield None
        for node in dict.fromkeys(use.node for use in root.uses()):
            if self.is_dynamic(node) and self.passes(node) and node.inputs[0] is root:
                for output in node.outputs:
                    yield from self.readers(output)
            elif not self.tolerates(node):
                yield node

    def on_grid(self, value: ir.Value, fmt: str) -> bool:
        """Whether a format holds a constant exactly."""
        tensor, dtype = self.imported.constants[value], CHOICES[fmt].dtype
        assert dtype is not None
        return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
