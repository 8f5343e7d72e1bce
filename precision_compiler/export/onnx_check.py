"""Checks a written ONNX file: the specification's checker, then a run against the fx graph.

The file is run by onnxruntime, or by the specification's own evaluator where it has formats that
onnxruntime does not know (e8m0 and e2m1).

How fine the comparison is. The two run the same operations but sum in another order, so a result
that lies near the middle between two bfloat16 numbers rounds up in one and down in the other:
one ulp (unit in the last place). Such disagreements, spread over n roundings, add up like a
random walk. An output is accepted if it differs by at most

    4 + sqrt(n) / 2   ulps

of the coarsest format in the graph at that output's largest magnitude, n being the nodes that
produce this format. Transformers of up to 12 layers stayed below 2.5 ulps. In a float32 graph a
node does not err by one rounding but by those of its sums, so there an ulp counts 16 times (1e-5
of the output with 100 nodes; measured: below 15 ulps in all). The comparison is therefore never
finer than a few ulps: it finds a wrong operation, a lost mask or a wrong weight, not a subtly
different rounding. In a graph with fp8 or narrower formats a few ulps may be more than the output
itself, so never more than a quarter of the largest magnitude is tolerated. Outputs of integers and
booleans must agree exactly.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from torch import fx

from precision_compiler.emulation import QUANTISE
from precision_compiler.errors import ExportError
from precision_compiler.export.onnx_emulation import ORT_ERRORS, Run, run_file
from precision_compiler.formats import CHOICES, FORMATS, Format, format_of_dtype
from precision_compiler.graph import value_of

_FLOAT32_SUM_ULPS = 16
_LARGEST_SHARE = 0.25


@dataclass(frozen=True)
class Comparison:
    """How a run of the file compared with the fx graph; the fields are those of ``OnnxReport``."""

    max_difference: float
    largest_output: float
    emulated_nodes: int
    evaluator: str


def check_file(
    path: Path,
    module: fx.GraphModule,
    arguments: Sequence[torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
) -> Comparison:
    """Check the file at ``path`` and compare it with ``module`` on one example.

    Args:
        path: the ONNX file.
        module: the graph it was made from.
        arguments: values of all placeholders of the graph, parameters included.
        inputs: values of the ONNX model's inputs, by name.

    Raises:
        ExportError: the file violates the specification, does not run, or differs too much.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"onnx.checker refuses the model: {_first_line(error)}") from error
    expected = _results(module, arguments, inputs)
    try:
        run = run_file(path, inputs)
    except ORT_ERRORS as error:
        raise ExportError(
            f"onnxruntime cannot run the model: {_first_line(error)}{_origin_named_in(error, path)}"
        ) from error
    return _compare(module.graph, expected, run)


def _results(
    module: fx.GraphModule, arguments: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    try:
        with torch.no_grad():
            made = module(*arguments)
    except (RuntimeError, IndexError) as error:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in inputs.items())
        raise ExportError(
            f"the model does not run on {shapes} ({_first_line(error)}): leave dimensions that "
            "cannot have any size out of dynamic"
        ) from error
    leaves = torch.utils._pytree.tree_leaves(made)
    return [leaf.cpu() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _origin_named_in(error: Exception, path: Path) -> str:
    """The entries of the ONNX node that onnxruntime complains about, for the end of a message."""
    nodes = {node.name: node for node in onnx.load(path, load_external_data=False).graph.node}
    found = re.search(r"with name '([^']+)'", str(error))
    if found is None or found[1] not in nodes:
        return ""
    entries = [f"{entry.key}={entry.value}" for entry in nodes[found[1]].metadata_props]
    return f" ({', '.join(entries)})"


# --- comparison ---------------------------------------------------------------------------------


def tolerated_ulps(graph: fx.Graph) -> tuple[float, Format]:
    """How many ulps an output may differ by, and of which format."""
    formats = [_format_of(node) for node in graph.nodes if node.op == "call_function"]
    known = [fmt for fmt in formats if fmt is not None]
    coarsest = min(known, key=lambda fmt: fmt.precision, default=FORMATS["fp32"])
    ulps = 4 + math.sqrt(known.count(coarsest)) / 2
    return (ulps * _FLOAT32_SUM_ULPS if coarsest == FORMATS["fp32"] else ulps), coarsest


def _format_of(node: fx.Node) -> Format | None:
    if node.target is QUANTISE:
        return CHOICES[str(node.args[1])]
    value = value_of(node)
    return None if value is None else format_of_dtype(value.dtype)


def _compare(graph: fx.Graph, expected: list[torch.Tensor], run: Run) -> Comparison:
    ulps, fmt = tolerated_ulps(graph)
    worst, largest = 0.0, 0.0
    for index, (wanted, found) in enumerate(zip(expected, run.outputs, strict=True)):
        if wanted.shape != found.shape:
            raise ExportError(
                f"output_{index} has shape {tuple(found.shape)} in {run.evaluator}, "
                f"{tuple(wanted.shape)} in the fx graph"
            )
        magnitude = _largest(wanted)
        difference = _difference(wanted, found)
        allowed = min(ulps * _ulp_at(magnitude, fmt), _LARGEST_SHARE * magnitude)
        allowed = allowed if wanted.is_floating_point() else 0.0
        if not difference <= allowed:
            raise ExportError(
                f"output_{index} differs by {difference:.2g} between {run.evaluator} and the fx "
                f"graph, largest value {magnitude:.3g}; {allowed:.2g} (at most {ulps:.0f} "
                f"{fmt.name} ulps) is tolerated"
            )
        worst, largest = max(worst, difference), max(largest, magnitude)
    return Comparison(worst, largest, run.emulated_nodes, run.evaluator)


def _largest(x: torch.Tensor) -> float:
    finite = x.double()[x.double().isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _difference(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """Largest absolute difference; the same infinity or NaN on both sides is none."""
    left, right = wanted.double(), found.double()
    same = (left == right) | (left.isnan() & right.isnan())
    gap = torch.where(same, 0.0, (left - right).abs()).nan_to_num(nan=torch.inf)
    return float(gap.max()) if gap.numel() else 0.0


def _ulp_at(magnitude: float, fmt: Format) -> float:
    exponent = math.frexp(magnitude)[1] - 1
    exponent = exponent if fmt.scaled else max(exponent, fmt.min_exponent)
    return math.ldexp(1.0, exponent - fmt.precision + 1)
