"""Writes a forward graph of ATen operations as an annotated, checked ONNX file."""

import contextlib
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError
from torch import fx

from precision_compiler.errors import ExportError
from precision_compiler.export.fold_weights import fold_weights
from precision_compiler.export.onnx_check import check_file
from precision_compiler.export.onnx_translation import CONSTANT_PREFIX, translate

_EXTERNAL_BYTES = 1_500_000_000
"""Weights beyond this go to a second file: one protobuf message holds at most 2 GiB."""


@dataclass(frozen=True)
class GraphInput:
    """One input of the ONNX model.

    Attributes:
        placeholder: name of the fx placeholder.
        name: public name of the ONNX input.
        example: a value with the shape and dtype of the input.
        dynamic: names of the sizes that stay open, by dimension.
    """

    placeholder: str
    name: str
    example: torch.Tensor
    dynamic: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxReport:
    """What was written, and how it compared.

    Attributes:
        path: the file.
        nodes: nodes of the ONNX graph.
        casts: those of them that are a Cast.
        max_difference: largest absolute difference of the evaluator to the fx graph.
        largest_output: largest magnitude among the outputs of the fx graph.
        emulated_nodes: nodes for whose formats the evaluator has no kernel that sums in float32;
            in the check, not in the file, they ran in float32 between casts.
        evaluator: what ran the file for the check: "onnxruntime", or "onnx.reference" where
            the file has formats that onnxruntime cannot even cast to.
    """

    path: Path
    nodes: int
    casts: int
    max_difference: float
    largest_output: float
    emulated_nodes: int
    evaluator: str


def write_onnx(
    module: fx.GraphModule,
    *,
    parameters: Mapping[str, tuple[str, torch.Tensor]],
    inputs: Sequence[GraphInput],
    annotations: Mapping[str, Mapping[str, str]],
    model_metadata: Mapping[str, str],
    path: Path,
    external_bytes: int = _EXTERNAL_BYTES,
) -> OnnxReport:
    """Write a forward-only graph as ONNX, check it and run it.

    Opset 23 and IR 10 unless a format needs more: opset 24 and IR 12 for MX formats, IR 11 for
    NVFP4. The file appears under ``path`` only after it passed ``onnx.checker`` and agreed with
    the fx graph when run, with other sizes of open dimensions too; see ``onnx_check.py`` for how
    closely the two are compared. Weights
    above 1.5 GB in all go to ``<path>.data``. Outputs are called ``output_0`` and so on. Shapes are
    those of the examples where they are not open. ``module`` is not changed.

    Args:
        module: functional ATen operations; its placeholders are parameters and inputs.
        parameters: placeholder name -> (initializer name, tensor).
        inputs: the other placeholders, in the order the ONNX model shall have.
        annotations: fx node name -> entries for every ONNX node that comes from it. A node that
            the exporter made up gets the entries of the nearest node that has some.
        model_metadata: entries of the model itself.
        path: where to write; its folder exists.
        external_bytes: weights of more go to a file of their own.

    Raises:
        ExportError: an operation has no ONNX form, or the file failed a check.
    """
    _refuse_names(module, parameters, inputs)
    tensors = {name: tensor for name, (_, tensor) in parameters.items()}
    tensors |= {given.placeholder: given.example for given in inputs}
    arguments = [tensors[node.name] for node in module.graph.find_nodes(op="placeholder")]
    open_sizes = {given.placeholder: given.dynamic for given in inputs}
    given = [tensor.detach().cpu() for tensor in arguments]
    model = translate(module, given, annotations, open_sizes)
    _name_values(model, module, parameters, inputs)
    fold_weights(model)
    model.metadata_props.update(model_metadata)
    operations = [node.op_type for node in model.graph]
    with published(model, path, external_bytes) as draft:
        comparison = check_file(
            draft, module, arguments, {given.name: given.example for given in inputs}
        )
        if any(given.dynamic for given in inputs):
            others = {given.placeholder: _resized(given) for given in inputs}
            arguments = [others.get(name, tensors[name]) for name in _placeholder_names(module)]
            check_file(draft, module, arguments, {g.name: others[g.placeholder] for g in inputs})
    return OnnxReport(
        path=path,
        nodes=len(operations),
        casts=operations.count("Cast"),
        max_difference=comparison.max_difference,
        largest_output=comparison.largest_output,
        emulated_nodes=comparison.emulated_nodes,
        evaluator=comparison.evaluator,
    )


def _resized(given: GraphInput) -> torch.Tensor:
    """The example of an input with other sizes in its open dimensions: less one, or 3 for 2."""
    example = given.example
    for dimension in given.dynamic:
        size = example.shape[dimension]
        last = example.narrow(dimension, size - 1, 1)
        shorter = example.narrow(dimension, 0, size - 1)
        example = shorter if size > 2 else torch.cat((example, last), dimension)
    return example.contiguous()


def read_metadata(path: Path) -> Mapping[str, str]:
    """Return the metadata of an ONNX model; external weights are not read.

    Raises:
        ExportError: the file cannot be read, or is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ExportError(f"cannot read the model {path}: {error.strerror}") from error
    except DecodeError as error:
        raise ExportError(f"{path} is not an ONNX model") from error
    return {entry.key: entry.value for entry in model.metadata_props}


def _refuse_names(
    module: fx.GraphModule,
    parameters: Mapping[str, tuple[str, torch.Tensor]],
    inputs: Sequence[GraphInput],
) -> None:
    given = [*parameters, *(item.placeholder for item in inputs)]
    held = [node.name for node in module.graph.find_nodes(op="placeholder")]
    if sorted(given) != sorted(held):
        odd = sorted(set(given) ^ set(held)) or [name for name in held if given.count(name) > 1]
        raise ExportError(
            f"placeholder {odd[0]} must be exactly one of a parameter and an input; "
            "a size is neither: capture with static shapes"
        )
    names = [name for name, _ in parameters.values()] + [item.name for item in inputs]
    names += [f"output_{index}" for index in range(len(_outputs(module.graph)))]
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"two inputs, outputs or parameters are called {name!r}: rename one")


def _outputs(graph: fx.Graph) -> list[fx.Node]:
    """The nodes the graph returns, in order."""
    leaves = torch.utils._pytree.tree_leaves(graph.output_node().args)
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _name_values(
    model: ir.Model,
    module: fx.GraphModule,
    parameters: Mapping[str, tuple[str, torch.Tensor]],
    inputs: Sequence[GraphInput],
) -> None:
    """Give inputs, outputs and parameters their public names, and turn parameters constant."""
    graph = model.graph
    model.producer_name, model.producer_version = "precision_compiler", None
    held = dict(zip(_placeholder_names(module), graph.inputs, strict=True))
    public = {held[name]: public for name, (public, _) in parameters.items()}
    public |= {held[given.placeholder]: given.name for given in inputs}
    public |= {value: f"output_{index}" for index, value in enumerate(graph.outputs)}
    _rename(graph, public)
    graph.inputs[:] = [held[given.placeholder] for given in inputs]
    for placeholder, (name, tensor) in parameters.items():
        value = held[placeholder]
        if value.uses() or value.is_graph_output():
            value.const_value = ir.tensor_adapters.TorchTensor(tensor.detach().cpu(), name=name)
            graph.initializers.add(value)


def _placeholder_names(module: fx.GraphModule) -> list[str]:
    return [node.name for node in module.graph.find_nodes(op="placeholder")]


def _rename(graph: ir.Graph, public: Mapping[ir.Value, str]) -> None:
    """Give some values their names, and all others and all nodes unique ones beside them."""
    inner = [*graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    inner = [value for value in inner if value not in public]
    held = {(value.name or "").removeprefix(CONSTANT_PREFIX) for value in inner}
    fresh = _fresh_names(held.union(public.values(), (value.name or "" for value in inner)))
    taken = set(public.values())
    for value, name in public.items():
        value.name = name
        value.metadata_props.clear()
    for value in inner:
        value.metadata_props.clear()
        name = (value.name or "").removeprefix(CONSTANT_PREFIX)
        value.name = next(fresh) if not name or name in taken else name
        taken.add(value.name)
    for node in graph:
        node.name = f"node_{node.outputs[0].name}"


def _fresh_names(taken: set[str]) -> Iterator[str]:
    return (name for name in map("value_{}".format, itertools.count()) if name not in taken)


# --- files --------------------------------------------------------------------------------------


@contextlib.contextmanager
def published(model: ir.Model, path: Path, external_bytes: int = _EXTERNAL_BYTES) -> Iterator[Path]:
    """Write a draft beside ``path`` and move it there if the body ends without an error."""
    weights = [value.const_value for value in model.graph.initializers.values()]
    large = sum(tensor.nbytes for tensor in weights if tensor is not None) > external_bytes
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        draft, data = Path(folder, path.name), f"{path.name}.data"
        ir.save(model, draft, external_data=data if large else None)
        yield draft
        if large:
            path.unlink(missing_ok=True)  # rather no model than an old one with new weights
            os.replace(draft.with_name(data), path.with_name(data))
        os.replace(draft, path)
