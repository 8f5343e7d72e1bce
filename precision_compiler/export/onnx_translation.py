"""Turns a forward graph of ATen operations into an annotated ONNX model in memory.

The graph is traced again with torch.export, because the exporter wants its program. Parameters
are graph inputs here, so that no clean-up can fold, merge or rename them. A node is never
recognised by its name, which the exporter changes, but by an id carried in
``node.meta["custom"]``.
"""

import contextlib
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch._dynamo.exc import UserError
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from precision_compiler.errors import ExportError
from precision_compiler.export.onnx_quantise import TRANSLATIONS, versions_of
from precision_compiler.export.onnx_tidy import FX_NODE, annotate, name_sizes, tidy

CONSTANT_PREFIX = "body."
"""What the exporter puts before the names of tensors that the graph module itself holds."""

aten = torch.ops.aten


def translate(
    module: fx.GraphModule,
    arguments: list[torch.Tensor],
    annotations: Mapping[str, Mapping[str, str]],
    open_sizes: Mapping[str, Mapping[int, str]],
) -> ir.Model:
    """Return the ONNX form of ``module``, every node annotated.

    Args:
        module: functional ATen operations; it is not changed.
        arguments: an example of every placeholder, on the CPU.
        annotations: fx node name -> entries for every ONNX node that comes from it.
        open_sizes: placeholder -> dimension -> name of its size, for those that are not fixed.

    Raises:
        ExportError: an operation has no ONNX form; the message names the node.
    """
    opset, ir_version = versions_of(module.graph)
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    sizes = [open_sizes.get(name, {}) for name in names]
    program = _export(module, arguments, opset, sizes)
    model = program.model
    name_sizes(model, sizes)
    model.ir_version = ir_version
    annotate(program, annotations)
    tidy(model)
    return model


def _var_mean(
    x: torch.Tensor,
    dim: list[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One operation each, where the exporter's own decomposition makes six."""
    dims = list(range(x.dim())) if dim is None else dim
    variance = aten.var.correction(x, dims, correction=correction, keepdim=keepdim)
    return variance, aten.mean.dim(x, dims, keepdim)


def _split(x: torch.Tensor, sizes: int | list[int], dim: int = 0) -> list[torch.Tensor]:
    """Slices, which keep their origin; the exporter's sequence of tensors loses it."""
    if isinstance(sizes, int):
        sizes = [min(sizes, x.shape[dim] - start) for start in range(0, x.shape[dim], sizes)]
    ends = list(itertools.accumulate(sizes))
    return [x.narrow(dim, end - size, size) for size, end in zip(sizes, ends, strict=True)]


def _iota(length: int, *, start: int, step: int, dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return torch.arange(start, start + length * step, step, dtype=dtype)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor]:
    """The first output only: the others are for the backward pass."""
    grouped = query.shape[1] != key.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention
    where = (attn_mask, dropout_p, is_causal)
    return (attend(query, key, value, *where, scale=scale, enable_gqa=grouped),)


_EXPORTABLE: Mapping[Any, Callable[..., Any]] = {
    aten.var_mean.correction: _var_mean,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.view.default: aten.reshape.default,  # strides may differ from those traced before
    torch.ops.prims.iota.default: _iota,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
"""Operations that the exporter does not know or does badly, in terms of those it knows."""


class _Rerun(fx.Interpreter):
    """Runs a graph with exportable operations in place of the others, on the CPU."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return super().call_function(_EXPORTABLE.get(target, target), args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        try:
            return super().run_node(n)
        except (RuntimeError, TypeError, IndexError) as error:
            reason = str(error).strip().splitlines()[:1]
            raise ExportError(_cannot(n, reason[0] if reason else "it cannot be traced")) from error


class _Program(torch.nn.Module):
    def __init__(self, body: fx.GraphModule) -> None:
        super().__init__()
        self.body = body

    def forward(self, *arguments: torch.Tensor) -> Any:
        rerun = _Rerun(self.body)
        rerun.extra_traceback = False  # errors name the node already, and stay one line
        return rerun.run(*arguments)


def _cannot(node: fx.Node, reason: str) -> str:
    return f"node {node.name} ({node.target}) cannot be written as ONNX: {reason}"


def _marked_copy(module: fx.GraphModule) -> fx.GraphModule:
    """A copy without dead code whose nodes carry their name as id, and nothing else."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {"custom": {FX_NODE: node.name}}
    copy = fx.GraphModule(module, graph)
    copy.graph.eliminate_dead_code()
    return copy


def _export(
    module: fx.GraphModule,
    arguments: list[torch.Tensor],
    opset: int,
    sizes: Sequence[Mapping[int, str]],
) -> torch.onnx.ONNXProgram:
    marked = _marked_copy(module)
    with torch.no_grad(), _quiet(), torch.fx.traceback.preserve_node_meta():
        program = _retraced(marked, arguments, sizes)
        try:
            # Not optimised: that would rename and merge parameters and drop annotations.
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                verbose=False,
                custom_translation_table=dict(TRANSLATIONS),
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(_blame(error, module)) from error
    if exported is None:
        raise ExportError("torch.onnx.export returned no model")
    return exported


def _retraced(
    module: fx.GraphModule, arguments: list[torch.Tensor], sizes: Sequence[Mapping[int, str]]
) -> torch.export.ExportedProgram:
    open_sizes = tuple(dict.fromkeys(held, Dim.DYNAMIC) for held in sizes)
    try:
        return torch.export.export(
            _Program(module).eval(), tuple(arguments), dynamic_shapes=(open_sizes,)
        )
    except (UserError, ConstraintViolationError) as error:
        names = ", ".join(name for held in sizes for name in held.values())
        raise ExportError(
            f"not all of the sizes {names} can stay open, an operation fixes one: leave it out of "
            f"dynamic ({str(error).strip().splitlines()[0]})"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence remarks of the exporter about itself and about packages nobody asked for."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _blame(error: BaseException, module: fx.GraphModule) -> str:
    """Name the node of the user's graph that the exporter stumbled over.

    The exporter reports a node of its own graph; the operation is what both have in common.
    """
    text, cause = "", error.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    found = re.search(r"translating node .*?target=torch\.ops\.([\w.]+)", text)
    if found is None:
        return f"the graph cannot be written as ONNX: {str(error).strip().splitlines()[0]}"
    target = found[1]
    reason = "no ONNX translation" if "No ONNX function" in text else "its translation failed"
    same = [node for node in module.graph.nodes if str(node.target) == target]
    if not same:
        return f"operation {target}, made while exporting, cannot be written as ONNX: {reason}"
    return _cannot(same[0], reason + (f" ({len(same)} such nodes)" if len(same) > 1 else ""))
