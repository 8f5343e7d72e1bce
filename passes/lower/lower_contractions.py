"""See LowerContractions."""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from precision_compiler import packing
from precision_compiler.errors import VerifyError
from precision_compiler.facts import NodeFacts, facts_of, set_facts
from precision_compiler.formats import CHOICES, FORMATS
from precision_compiler.graph import (
    aten,
    contraction_rule,
    insert_call,
    is_cast,
    is_movement,
    root_of,
    shape_of,
    value_of,
)
from precision_compiler.lowering.products import (
    BLOCK_GEMM,
    SCALED_GEMM,
    SCALED_MM,
    SIXTEEN_BITS,
    format_of_product,
)
from precision_compiler.lowering.support import reason_against_product
from precision_compiler.pipeline import Numerics, Unit
from precision_compiler.problem import fixes_result
from precision_compiler.scaling import RECIPES, Content, hardware_format
from precision_compiler.sites import contents_of, named_nodes, operand_nodes
from precision_compiler.tf32 import TF32_MATMUL


@dataclass(frozen=True)
class LowerContractions:
    """Give products in formats without a plain dtype the operations that GPUs run them with.

    Only where the graph is on a GPU; elsewhere, and for what no kernel runs, the next pass
    emulates. Numbers are those of emulation: the same rounding, scales and float32 sums.

    1. tf32 is the product itself under float32's tensor-core mode, for this product alone.
    2. e4m3 (e4m3fnuz) is ``aten._scaled_mm`` with a scale per tensor. Products of two e5m2
       (e5m2fnuz) operands, which cuBLAS lacks, are the kernel ``scaled_gemm``.
    3. e4m3 with scales per row is ``aten._scaled_mm`` where the result is kept in bf16, which is
       all that its kernel returns, else ``scaled_gemm``; with scales per block of 128, of weights
       128 x 128, it is ``aten._scaled_mm``.
    4. mxfp8, mxfp4 and nvfp4 are ``aten._scaled_mm`` with block scales in cuBLAS's order; on AMD,
       which has another, the kernel ``block_gemm``.
    5. Operands are calls of ``packing``, which later passes replace: one scale per
       (tensor, format), one copy of the elements per operand with the summed axis last, shared by
       all products that read it so. NVFP4's recipes round and rotate them as ``scaling.py`` says.
    6. Sums and the right operand's rows are filled up with zeros to what the kernel asks for, and
       the result is cut.
    7. The result comes in the narrower dtype that it is stored in if nothing else reads it, else
       in float32; an addend and NVFP4's scale of the tensor are applied in float32.
    """

    name: ClassVar[str] = "lower-contractions"
    reads: ClassVar[frozenset[str]] = frozenset({"assignment"})
    makes: ClassVar[frozenset[str]] = frozenset()
    spoils: ClassVar[frozenset[str]] = frozenset()
    numerics: ClassVar[Numerics] = Numerics.CHANGES

    def run(self, unit: Unit) -> bool:
        """Replace the products; note in the journal what was left, and why."""
        graph = unit.joint.module.graph
        named = named_nodes(graph)
        recipes = [node for name, node in named.items() if unit.assignment.get(name) in RECIPES]
        contents = contents_of(graph, unit.joint.parameters, recipes)
        lowering = _Lowering(graph, contents, amd=unit.architecture.startswith("gfx"))
        changed = False
        for name, node in named.items():
            fmt = unit.assignment.get(name, "fp32")
            if fixes_result(fmt) or contraction_rule(node) is None or not _is_on_gpu(node):
                continue
            reason = reason_against_product(node, fmt, unit.architecture)
            if reason:
                unit.journal.note(self.name, f"{name} is emulated in {fmt}: {reason}")
            else:
                lowering.lower(node, name, fmt)
                changed = True
        return changed


class _Lowering:
    """One lowering of one graph."""

    def __init__(
        self, graph: fx.Graph, contents: Mapping[tuple[fx.Node, int], Content], amd: bool
    ) -> None:
        self.graph, self.contents, self.amd = graph, contents, amd
        self.made: dict[tuple[object, ...], list[fx.Node]] = {}

    def lower(self, node: fx.Node, name: str, fmt: str) -> None:
        """Replace one product."""
        dtype, cast = _result_of(node, fmt)
        factors: list[fx.Node] = []
        if fmt == "tf32":
            product = self._call(TF32_MATMUL, operand_nodes(node), like=node)
        elif hardware_format(fmt) in FORMATS and CHOICES[fmt].by_axis:
            product = self._scaled_product(node, fmt, dtype)
        elif CHOICES[fmt].block:
            product, factors = self._block_product(node, fmt, dtype)
        else:
            product = self._tensor_product(node, fmt, dtype)
        found = format_of_product(product)
        if found not in (fmt, hardware_format(fmt)):
            raise VerifyError(f"{name} multiplies {found} where the plan has {fmt}")
        set_facts(product, NodeFacts(name, name, f"multiplied in {fmt}"))
        self._put(product, factors, node, cast)

    def _tensor_product(self, node: fx.Node, fmt: str, dtype: torch.dtype) -> fx.Node:
        elements, scales = [], []
        for operand, is_right in zip(operand_nodes(node), (False, True), strict=True):
            encode, decode = self._once(packing.tensor_scale, root_of(operand), (), (fmt,))
            options = (fmt, is_right)
            elements += self._once(packing.tensor_operand, operand, (encode,), options)
            scales.append(decode)
        if fmt not in ("e5m2", "e5m2fnuz"):
            return self._scaled_mm(elements, scales, dtype, node)
        rows = [self._call(aten.view.default, (scale, [1]), node) for scale in scales]
        return self._call(SCALED_GEMM, (*elements, *rows, None, "none", dtype, False), node)

    def _scaled_product(self, node: fx.Node, fmt: str, dtype: torch.dtype) -> fx.Node:
        operands = zip(operand_nodes(node), (False, True), self._contents(node), strict=True)
        parts = [
            self._once(packing.scaled_operand, operand, (), (fmt, is_right, content))
            for operand, is_right, content in operands
        ]
        (left, left_scales, _), (right, right_scales, _) = parts
        if fmt == "e4m3_row" and dtype != torch.bfloat16:
            rows = [
                self._call(aten.view.default, (scale, [-1]), node)
                for scale in (left_scales, right_scales)
            ]
            return self._call(SCALED_GEMM, (left, right, *rows, None, "none", dtype, False), node)
        turned = self._call(aten.permute.default, (right_scales, [1, 0]), node)
        return self._scaled_mm([left, right], [left_scales, turned], dtype, node)

    def _contents(self, node: fx.Node) -> list[Content]:
        """What the two operands of a product are."""
        rule = contraction_rule(node)
        places = rule.operands if rule is not None else ()
        return [self.contents.get((node, place), "activation") for place in places]

    def _block_product(
        self, node: fx.Node, fmt: str, dtype: torch.dtype
    ) -> tuple[fx.Node, list[fx.Node]]:
        """The product, and what its result is still to be multiplied by."""
        operands = zip(operand_nodes(node), (False, True), self._contents(node), strict=True)
        parts = [
            self._once(packing.block_operand, operand, (), (fmt, right, not self.amd, content))
            for operand, right, content in operands
        ]
        (left, left_scales, left_whole), (right, right_scales, right_whole) = parts
        if not self.amd:
            two_levels = hardware_format(fmt) == "nvfp4"
            factors = [left_whole, right_whole] if two_levels else []
            scales = [left_scales, right_scales]
            return self._scaled_mm([left, right], scales, dtype, node), factors
        *codes, left, right = (
            part if fmt == "mxfp8" and part in (left, right) else self._bytes(part, node)
            for part in (left_scales, right_scales, left, right)
        )
        one = self._call(aten.view.default, (left_whole, [1]), node)
        kernel = (left, right, *codes, one, hardware_format(fmt), dtype)
        return self._call(BLOCK_GEMM, kernel, node), []

    def _bytes(self, tensor: fx.Node, node: fx.Node) -> fx.Node:
        return self._call(aten.view.dtype, (tensor, torch.uint8), node)

    def _scaled_mm(
        self, elements: list[fx.Node], scales: list[fx.Node], dtype: torch.dtype, node: fx.Node
    ) -> fx.Node:
        left, right = elements
        turned = self._call(aten.permute.default, (right, [1, 0]), node)
        args = (left, turned, *scales, None, None, dtype, False)
        return self._call(SCALED_MM, args, node)

    def _put(
        self, product: fx.Node, factors: list[fx.Node], node: fx.Node, cast: fx.Node | None
    ) -> None:
        """Let everything read the product that read the node, or the only cast of it."""
        result = product
        if isinstance(product.meta["val"], tuple):
            result = self._call(operator.getitem, (product, 0), node)
        if shape_of(result) != shape_of(node):
            result = self._call(aten.slice.Tensor, (result, 1, 0, shape_of(node)[1]), node)
        for factor in factors:
            result = self._call(aten.mul.Tensor, (result, factor), node)
        for addend in _addends(node):
            result = self._call(aten.add.Tensor, (result, addend), node)
        replaced = cast or node
        if cast is None and (facts := facts_of(node)) is not None and result is not product:
            set_facts(result, NodeFacts(f"{facts.name}.result", None, "result of the product"))
        replaced.replace_all_uses_with(result)
        self.graph.erase_node(replaced)
        if cast is not None:
            self.graph.erase_node(node)

    def _once(
        self,
        function: Callable[..., Any],
        tensor: fx.Node,
        further: tuple[fx.Node, ...],
        options: tuple[object, ...],
    ) -> list[fx.Node]:
        """What a function makes of a tensor, one time for each (elements, view, options)."""
        key = (function, *_view_of(tensor), *options)
        if key not in self.made:
            root = root_of(tensor)
            call = insert_call(
                self.graph, function, (tensor, *further, *options),
                after=max([tensor, *further]), like=root,
            )  # fmt: skip
            self.made[key] = [call] if value_of(call) is not None else self._parts(call)
        return self.made[key]

    def _parts(self, call: fx.Node) -> list[fx.Node]:
        parts: list[fx.Node] = []
        for index in range(len(call.meta["val"])):
            last = parts[-1] if parts else call
            made = insert_call(self.graph, operator.getitem, (call, index), after=last, like=call)
            parts.append(made)
        return parts

    def _call(self, target: Any, args: Sequence[Any], like: fx.Node) -> fx.Node:
        after = max([like, *(argument for argument in args if isinstance(argument, fx.Node))])
        return insert_call(self.graph, target, tuple(args), after=after, like=like)


def _addends(node: fx.Node) -> list[fx.Node]:
    """What a product adds to its sum."""
    rule = contraction_rule(node)
    given = [node.args[place] for place in rule.companions] if rule is not None else []
    return [addend for addend in given if isinstance(addend, fx.Node)]


def _is_on_gpu(node: fx.Node) -> bool:
    value = value_of(operand_nodes(node)[0])
    return value is not None and value.device.type == "cuda"


def _result_of(node: fx.Node, fmt: str) -> tuple[torch.dtype, fx.Node | None]:
    """The dtype that a product can return at once, and the cast that it makes superfluous."""
    readers = list(node.users)
    if hardware_format(fmt) in ("tf32", "nvfp4") or _addends(node) or len(readers) != 1:
        return torch.float32, None
    value = value_of(readers[0])
    if not is_cast(readers[0]) or value is None or value.dtype not in SIXTEEN_BITS:
        return torch.float32, None
    return value.dtype, readers[0]


def _view_of(node: fx.Node) -> tuple[object, ...]:
    """A tensor's root and the steps from it, equal for nodes that show the same elements alike."""
    steps: list[object] = []
    while is_movement(node):
        parent, *options = node.args
        steps += [node.target, repr(options), repr(node.kwargs)]
        assert isinstance(parent, fx.Node)
        node = parent
    return (node, *steps)
