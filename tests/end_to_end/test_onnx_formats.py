"""Narrow formats in exported files: their numbers bit for bit, where compilers look for them."""

import operator
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import precision_compiler
from precision_compiler.emulation import QUANTISE
from precision_compiler.errors import ExportError
from precision_compiler.export import graph_to_export
from precision_compiler.export.onnx_emulation import run_file
from precision_compiler.export.onnx_reference import evaluated
from precision_compiler.export.onnx_writer import GraphInput, OnnxReport, write_onnx
from precision_compiler.formats import CHOICES, format_of_dtype, quantised, ulp
from precision_compiler.graph import ATTENTION, is_cast, is_movement
from precision_compiler.scaling import SCALED_FORMATS
from tests.models import everywhere, made
from tests.node_by_node import Compared, allowed_ulps, compared, ulps_apart

BLOCKS = ("mxfp8", "mxfp8e5m2", "mxfp4", "nvfp4")
ELEMENTS: Mapping[str, int] = {
    "e4m3": TensorProto.FLOAT8E4M3FN,
    "e5m2": TensorProto.FLOAT8E5M2,
    "e2m1": TensorProto.FLOAT4E2M1,
}


def export(name: str, fmt: str, path: Path) -> tuple[OnnxReport, onnx.ModelProto]:
    case = made(name)
    report = precision_compiler.export_onnx(case.model, case.batch, everywhere(name, fmt), path)
    return report, onnx.load(path)


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


def weights(model: onnx.ModelProto) -> Mapping[str, onnx.TensorProto]:
    return {weight.name: weight for weight in model.graph.initializer}


# --- one rounding -------------------------------------------------------------------------------


def alone(path: Path, function: Callable[[Tensor], Tensor], x: Tensor) -> onnx.ModelProto:
    """A file of one function of one tensor, checked on ``x``."""
    module = make_fx(function, tracing_mode="fake")(x)
    holder = module.graph.find_nodes(op="placeholder")[0].name
    inputs = [GraphInput(holder, "x", x)]
    write_onnx(module, parameters={}, inputs=inputs, annotations={}, model_metadata={}, path=path)
    return onnx.load(path)


def wide_ranging(*shape: int) -> Tensor:
    """Numbers whose magnitudes differ within blocks and between them, zeros among them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator)
    spread = torch.randint(-24, 4, shape, generator=generator)
    coarse = torch.randint(-60, 60, (shape[0], 1), generator=generator)
    x = torch.ldexp(x, spread + coarse)
    x[:, 32:64] = 0.0
    x[0] = 0.0
    return x


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("name", BLOCKS)
def test_block_formats_are_bit_for_bit_ours(name: str, axis: int, tmp_path: Path) -> None:
    x = wide_ranging(64, 96) if axis == -1 else wide_ranging(96, 64).T.contiguous()
    if SCALED_FORMATS[name].scaling.scale == "e4m3":  # two levels reach less far
        x = x.clamp(-1e4, 1e4)
    path = tmp_path / "one.onnx"
    alone(path, lambda x: QUANTISE(x, name, axis), x)
    run = run_file(path, {"x": x})
    assert run.evaluator == "onnx.reference"
    assert torch.equal(run.outputs[0], quantised(x, CHOICES[name], axis=axis))
    batched = x.reshape(2, -1, x.shape[-1])
    alone(path, lambda x: QUANTISE(x, name, axis), batched)
    wanted = quantised(batched, CHOICES[name], axis=axis)
    assert torch.equal(run_file(path, {"x": batched}).outputs[0], wanted)


@pytest.mark.parametrize("name", ["mxfp8", "mxfp8e5m2", "mxfp4"])
def test_scales_round_up_to_a_power_of_two_exactly(name: str, tmp_path: Path) -> None:
    largest = CHOICES[name].max_finite
    edges = torch.tensor([largest, 1.0, 1.5, 1.75, 3.9]).repeat_interleave(3)
    steps = torch.tensor([-torch.inf, 0.0, torch.inf]).repeat(5)
    exact = torch.where(steps == 0, edges, edges.nextafter(steps))
    exponents = torch.arange(-100, 100).float()
    amax = (exact[:, None] * torch.exp2(exponents)).flatten()
    x = torch.linspace(-1, 1, 32) * amax[:, None]
    path = tmp_path / "one.onnx"
    alone(path, lambda x: QUANTISE(x, name), x)
    assert torch.equal(run_file(path, {"x": x}).outputs[0], quantised(x, CHOICES[name]))


@pytest.mark.parametrize("amax", [0.0, 1e-30, 3.0, 450.0, 1e30])
@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_a_fixed_scale_saturates_in_both_evaluators(name: str, amax: float, tmp_path: Path) -> None:
    reach = torch.ldexp(torch.linspace(-2, 2, 257), torch.arange(257) % 40 - 36)
    x = torch.cat((reach * (amax or 1e3), torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])))
    path = tmp_path / "one.onnx"
    model = alone(path, lambda x: QUANTISE(x, name, -1, amax), x)
    wanted = quantised(x, CHOICES[name], amax)
    run = run_file(path, {"x": x})
    assert run.evaluator == "onnxruntime"
    assert torch.equal(run.outputs[0], wanted)
    assert np.array_equal(evaluated(model, {"x": x.numpy()})[0], wanted.numpy())
    assert float(wanted.abs().max()) < torch.inf
    scale = next(iter(weights(model).values()))
    assert (scale.data_type, list(scale.dims)) == (TensorProto.FLOAT, [])


# --- whole models -------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", *BLOCKS])
def test_products_read_dequantised_operands_directly(fmt: str, tmp_path: Path) -> None:
    report, model = export("gpt", fmt, tmp_path / "gpt.onnx")
    known, row = makers(model), SCALED_FORMATS.get(fmt)
    assert report.evaluator == ("onnx.reference" if row else "onnxruntime")
    versions = {"e8m0": (24, 12), "e4m3": (23, 11)}[row.scaling.scale] if row else (23, 10)
    assert (model.opset_import[0].version, model.ir_version) == versions
    products = [node for node in model.graph.node if node.op_type in ("Gemm", "MatMul")]
    assert len(products) == 9
    for node in products:
        sources = [known[name] for name in node.input[:2]]
        assert [source.op_type for source in sources] == ["DequantizeLinear"] * 2
        assert sources[1].input[0] in weights(model)
        assert sources[0].input[0] not in weights(model)


@pytest.mark.parametrize("fmt", ["e4m3", "e5m2", *BLOCKS])
def test_weights_are_stored_narrow_and_are_ours(fmt: str, tmp_path: Path) -> None:
    _, model = export("gpt", fmt, tmp_path / "gpt.onnx")
    element = SCALED_FORMATS[fmt].element.name if fmt in SCALED_FORMATS else fmt
    stored = [w for w in model.graph.initializer if w.data_type == ELEMENTS[element]]
    held = dict(made("gpt").model.named_parameters())
    known = makers(model)
    assert len(stored) == 9
    for weight in stored:
        original = held[weight.name.rpartition(".")[0]].detach().T.contiguous()
        assert tuple(weight.dims) == tuple(original.shape)
        assert len(weight.raw_data) == original.numel() * CHOICES[fmt].bits // 8
        name = next(n.output[0] for n in known.values() if weight.name in n.input)
        part = onnx.utils.Extractor(model).extract_model([], [name])
        found = torch.from_numpy(evaluated(part, {})[0])
        assert torch.equal(found, quantised(original, CHOICES[fmt], axis=-2))
    left = held.keys() & weights(model).keys()
    assert not any(name.endswith(("qkv.weight", "fc.weight", "proj.weight")) for name in left)
    assert "embed.weight" in left  # the embedding itself


def test_nodes_say_where_their_scale_comes_from(tmp_path: Path) -> None:
    _, model = export("mlp", "e4m3", tmp_path / "mlp.onnx")
    batch = made("mlp").batch
    said = [
        {entry.key: entry.value for entry in node.metadata_props}
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    ]
    amax = float(batch[0].abs().max())
    assert any(
        notes["precision_compiler.scale"].startswith("2^-")
        and f"on the export batch, {amax:.6g}" in notes["precision_compiler.scale"]
        for notes in said
    )
    assert {notes["precision_compiler.storage_format"] for notes in said} == {"e4m3"}


@pytest.mark.parametrize("fmt", ["mxfp6", "mxfp6e3m2"])
def test_a_format_that_nothing_runs_is_refused_by_site(fmt: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"^up\.fprop: {fmt} needs ONNX opset 28.*override"):
        export("mlp", fmt, tmp_path / "mlp.onnx")
    assert not list(tmp_path.iterdir())


def test_a_sum_that_blocks_do_not_divide_is_refused_by_site(tmp_path: Path) -> None:
    case, plan = made("mlp"), everywhere("mlp", "mxfp8")
    with pytest.raises(ExportError, match=r"^up\.fprop: a sum over 16 elements .* blocks of 32"):
        precision_compiler.export_onnx(case.model, case.batch, plan, tmp_path / "mlp.onnx")


# --- node by node -------------------------------------------------------------------------------


def differences(name: str, fmt: str, path: Path) -> list[Compared]:
    """Every node of an exported model, in the file and in the rewritten graph."""
    case, plan = made(name), everywhere(name, fmt)
    if not path.exists():
        precision_compiler.export_onnx(case.model, case.batch, plan, path)
    joint = graph_to_export(case.model, case.batch, plan)
    batch = {"x": case.batch} if isinstance(case.batch, Tensor) else case.batch
    if not isinstance(batch, Mapping):
        names = [str(value.name) for value in ir.load(path).graph.inputs]
        batch = dict(zip(names, batch, strict=True))
    return list(compared(path, joint.module, joint.inputs, dict(batch)))


def is_exact(node: fx.Node) -> bool:
    return node.target is QUANTISE or is_cast(node) or is_movement(node)


def agrees(item: Compared) -> bool:
    """Equal where nothing may differ; else within one ulp and what sums in another order may do.

    And as near to the exact value as torch, to one ulp of the largest element for each operation
    that the node is written in: sums come nowhere near what they may do.
    """
    if is_exact(item.node) or not item.wanted.is_floating_point():
        return torch.equal(item.wanted, item.found)
    finite = item.wanted.isfinite()
    if not torch.equal(item.wanted[~finite], item.found[~finite]):
        return False
    if not bool((ulps_apart(item) <= allowed_ulps(item))[finite].all()):
        return False
    wanted, found, exact = (
        tensor[finite].double() for tensor in (item.wanted, item.found, item.exact)
    )
    fmt = format_of_dtype(item.wanted.dtype)
    assert fmt is not None
    step = item.operations * float(ulp(wanted.abs().max(), fmt))
    return float((found - exact).abs().max()) <= float((wanted - exact).abs().max()) + step


@pytest.mark.parametrize(
    ("name", "fmt"),
    [("gpt", "fp32"), ("gpt", "bf16"), ("gpt", "fp16"), ("gpt", "e4m3"), ("gpt", "mxfp8"),
     ("gpt", "nvfp4"), ("llama", "e5m2"), ("llama", "bf16"), ("explicit", "e4m3")],
)  # fmt: skip
def test_every_node_computes_what_its_fx_node_does(name: str, fmt: str, tmp_path: Path) -> None:
    items = differences(name, fmt, tmp_path / "model.onnx")
    assert [item.node.name for item in items if not agrees(item)] == []
    narrow = [item for item in items if item.wanted.dtype in (torch.bfloat16, torch.float16)]
    assert bool(narrow) == (fmt in ("bf16", "fp16"))
    for item in narrow:
        if item.node.target not in ATTENTION:  # the only one whose results cancel
            assert float(ulps_apart(item).max()) <= 1.0, item.node.name
    seen = {item.node for item in items}
    calls = [node for node in items[0].node.graph.nodes if node.op == "call_function"]
    parts = {operator.getitem, *(node.target for node in calls if is_movement(node))}
    missing = [node for node in calls if node not in seen and node.target not in parts]
    assert [node.name for node in missing if node.all_input_nodes] == []  # constants are folded


def test_a_wrong_scale_is_found_at_its_node(tmp_path: Path) -> None:
    path = tmp_path / "gpt.onnx"
    export("gpt", "e4m3", path)
    model = onnx.load(path)
    rounding = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
    scale = next(w for w in model.graph.initializer if w.name == rounding.input[1])
    wrong = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * 64, "wrong")
    model.graph.initializer.append(wrong)
    rounding.input[1] = "wrong"
    onnx.save(model, path)
    bad = [item for item in differences("gpt", "e4m3", path) if not agrees(item)]
    assert [item.node.target for item in bad] == [QUANTISE]
