"""Graphs as Inductor hands them over, written as ONNX, read back and run."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx.experimental.proxy_tensor import make_fx

from precision_compiler.emulation import QUANTISE
from precision_compiler.errors import ExportError
from precision_compiler.export import onnx_writer
from precision_compiler.export.onnx_check import check_file, tolerated_ulps
from precision_compiler.export.onnx_writer import GraphInput, OnnxReport, read_metadata, write_onnx
from precision_compiler.formats import ulp

aten = torch.ops.aten
CONVERT = torch.ops.prims.convert_element_type.default
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default
ORIGIN = "precision_compiler.origin"
LAYERS, CONTRACTIONS = 2, 2 * 5 + 1

# --- a small GPT, captured where the compiler captures it ---------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.between = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.before(x)).view(batch, length, 3, self.heads, -1)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).reshape(batch, length, width))
        made: torch.Tensor = self.down(F.gelu(self.up(self.between(x))))
        return x + made


class Gpt(nn.Module):
    def __init__(self, words: int = 96, width: int = 32, heads: int = 4, length: int = 16) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(LAYERS)))
        self.last = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        return F.linear(self.last(self.blocks(x)), self.words.weight)


class Example:
    """A captured graph with everything ``write_onnx`` wants to know about it."""

    def __init__(
        self,
        module: fx.GraphModule,
        parameters: Mapping[str, tuple[str, torch.Tensor]],
        inputs: list[GraphInput],
    ) -> None:
        self.module, self.parameters, self.inputs = module, dict(parameters), inputs

    @property
    def arguments(self) -> list[torch.Tensor]:
        values = {name: tensor for name, (_, tensor) in self.parameters.items()}
        values |= {given.placeholder: given.example for given in self.inputs}
        return [values[node.name] for node in self.module.graph.find_nodes(op="placeholder")]

    def annotations(self) -> dict[str, dict[str, str]]:
        nodes = self.module.graph.nodes
        return {node.name: {"node": node.name, "target": str(node.target)} for node in nodes}

    def write(self, path: Path, **changes: Any) -> OnnxReport:
        given: dict[str, Any] = {
            "parameters": self.parameters,
            "inputs": self.inputs,
            "annotations": self.annotations(),
            "model_metadata": {"plan": "everything"},
        }
        return write_onnx(self.module, path=path, **(given | changes))


def copied(module: fx.GraphModule) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(module, graph)


def capture(model: nn.Module, example: torch.Tensor) -> Example:
    """The inference graph at Inductor's joint-graph hook; nothing is compiled."""
    kept: list[fx.GraphModule] = []
    values: list[torch.Tensor] = []

    class Keep(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            assert graph.owning_module is not None
            kept.append(copied(graph.owning_module))

        def uuid(self) -> None:
            return None

    def inner(graph: fx.GraphModule, *_: object, **__: object) -> Any:
        def run(given: list[Any]) -> Any:
            return graph(*given)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: fx.GraphModule, given: list[torch.Tensor]) -> Any:
        values.extend(given)
        patches = {"joint_custom_pre_pass": Keep(), "fx_graph_cache": False}
        return compile_fx(graph, given, inner_compile=inner, config_patches=patches)

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=False)(example)
    names = {id(tensor): name for name, tensor in model.named_parameters()}
    holders = kept[0].graph.find_nodes(op="placeholder")
    pairs = [(node.name, value) for node, value in zip(holders, values, strict=True)]
    return Example(
        kept[0],
        {name: (names[id(value)], value) for name, value in pairs if id(value) in names},
        [GraphInput(name, "tokens", value) for name, value in pairs if id(value) not in names],
    )


def contract_in(module: fx.GraphModule, dtype: torch.dtype) -> None:
    """Let every contraction read and write ``dtype``, as the compiler's rewriting does."""
    graph = module.graph

    def cast(node: fx.Node, to: torch.dtype) -> fx.Node:
        made = graph.call_function(CONVERT, (node, to))
        made.meta["val"] = node.meta["val"].to(to)
        return made

    for node in list(graph.nodes):
        if node.target not in (aten.addmm.default, aten.mm.default, ATTENTION):
            continue
        with graph.inserting_before(node):
            node.args = tuple(
                cast(arg, dtype) if isinstance(arg, fx.Node) else arg for arg in node.args
            )
        result = node
        if node.target is ATTENTION:
            result = next(user for user in node.users if user.args[1] == 0)
        users = list(result.users)
        result.meta["val"] = result.meta["val"].to(dtype)
        with graph.inserting_after(result):
            wide = graph.call_function(CONVERT, (result, torch.float32))
            wide.meta["val"] = result.meta["val"].float()
        for user in users:
            user.replace_input_with(result, wide)
    graph.lint()
    module.recompile()


@pytest.fixture(scope="module")
def captured() -> Example:
    torch.manual_seed(0)
    return capture(Gpt().eval(), torch.randint(0, 96, (2, 16)))


@pytest.fixture
def gpt(captured: Example) -> Example:
    return Example(copied(captured.module), captured.parameters, captured.inputs)


def traced(
    function: Callable[..., Any], parameters: dict[str, torch.Tensor], **inputs: torch.Tensor
) -> Example:
    """A graph of ``function(*parameters, *inputs)``."""
    module = make_fx(function, tracing_mode="fake")(*parameters.values(), *inputs.values())
    holders = [node.name for node in module.graph.find_nodes(op="placeholder")]
    weights = dict(zip(holders, parameters.items(), strict=False))
    rest = zip(holders[len(weights) :], inputs.items(), strict=True)
    return Example(
        module, weights, [GraphInput(holder, name, value) for holder, (name, value) in rest]
    )


def entries(node: onnx.NodeProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in node.metadata_props}


def in_ulps(report: OnnxReport, example: Example) -> float:
    _, fmt = tolerated_ulps(example.module.graph)
    return report.max_difference / float(ulp(torch.tensor(report.largest_output), fmt))


# --- what is written ----------------------------------------------------------------------------


def test_a_float32_graph_agrees_with_onnxruntime(gpt: Example, tmp_path: Path) -> None:
    report = gpt.write(tmp_path / "gpt.onnx")

    assert report.path == tmp_path / "gpt.onnx"
    assert (report.casts, report.emulated_nodes) == (0, 0)
    assert report.max_difference < 1e-5 * report.largest_output
    assert [entry.name for entry in tmp_path.iterdir()] == ["gpt.onnx"]


def test_the_file_has_public_names_and_modern_operations(gpt: Example, tmp_path: Path) -> None:
    report = gpt.write(tmp_path / "gpt.onnx")
    model = onnx.load(report.path)

    names = {name for name, _ in gpt.parameters.values()}
    assert names <= {weight.name for weight in model.graph.initializer}
    assert [given.name for given in model.graph.input] == ["tokens"]
    assert [made.name for made in model.graph.output] == ["output_0"]
    assert (model.ir_version, model.opset_import[0].version) == (10, 23)
    assert len(model.graph.node) == report.nodes
    assert Counter(node.op_type for node in model.graph.node)["Attention"] == LAYERS


@pytest.mark.parametrize(
    ("dtype", "element", "emulated"),
    [
        (torch.bfloat16, TensorProto.BFLOAT16, CONTRACTIONS),
        (torch.float16, TensorProto.FLOAT16, 0),
    ],
)
def test_contractions_keep_their_format(
    gpt: Example, tmp_path: Path, dtype: torch.dtype, element: int, emulated: int
) -> None:
    contract_in(gpt.module, dtype)
    report = gpt.write(tmp_path / "gpt.onnx")
    model = onnx.load(report.path)

    casts = sum(node.target is CONVERT for node in gpt.module.graph.nodes)
    assert (report.casts, report.emulated_nodes) == (casts, emulated)
    assert in_ulps(report, gpt) <= 4
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    contractions = [n for n in model.graph.node if n.op_type in ("Gemm", "MatMul", "Attention")]
    assert len(contractions) == CONTRACTIONS
    for node in contractions:
        assert {types[name] for name in (*node.input, *node.output)} == {element}


def test_the_graph_is_left_as_it_was(gpt: Example, tmp_path: Path) -> None:
    before = gpt.module.code, [dict(node.meta) for node in gpt.module.graph.nodes]
    gpt.write(tmp_path / "gpt.onnx")
    assert before == (gpt.module.code, [dict(node.meta) for node in gpt.module.graph.nodes])


def test_outputs_of_any_kind_are_numbered(tmp_path: Path) -> None:
    def several(weight: torch.Tensor, x: torch.Tensor) -> Any:
        y = aten.mm.default(x, weight)
        return x, y, y, None, aten.argmax.default(y, -1), aten.gt.Scalar(y, 0.0), weight

    example = traced(several, {"weight": torch.randn(4, 4)}, x=torch.randn(3, 4))
    report = example.write(tmp_path / "several.onnx")

    outputs = onnx.load(report.path).graph.output
    assert [made.name for made in outputs] == [f"output_{index}" for index in range(6)]


def test_bfloat16_may_cross_the_boundary(tmp_path: Path) -> None:
    weight, x = torch.randn(4, 5).bfloat16(), torch.randn(3, 4).bfloat16()
    example = traced(lambda weight, x: aten.mm.default(x, weight), {"weight": weight}, x=x)
    report = example.write(tmp_path / "low.onnx")
    assert (report.emulated_nodes, report.casts, report.max_difference) == (1, 0, 0.0)


def test_a_parameter_may_be_called_like_an_inner_value(tmp_path: Path) -> None:
    def twice(weight: torch.Tensor, x: torch.Tensor) -> Any:
        return aten.mm.default(aten.mm.default(x, weight), weight)

    example = traced(twice, {"mm": torch.randn(4, 4)}, val_0=torch.randn(3, 4))
    model = onnx.load(example.write(tmp_path / "twice.onnx").path)
    assert [weight.name for weight in model.graph.initializer] == ["mm"]


def test_split_and_constants_of_the_graph_are_written(tmp_path: Path) -> None:
    def halves(x: torch.Tensor) -> Any:
        left, right = aten.split.Tensor(x, 2, 1)
        return aten.mul.Tensor(left, right)

    example = traced(halves, {}, x=torch.randn(3, 4))
    graph = example.module.graph
    example.module.register_buffer("offset", torch.randn(2))
    made = graph.output_node().args[0]
    assert isinstance(made, fx.Node)
    with graph.inserting_after(made):
        constant = graph.get_attr("offset")
    with graph.inserting_after(constant):
        total = graph.call_function(aten.add.Tensor, (made, constant))
    graph.output_node().args = (total,)
    example.module.recompile()

    model = onnx.load(example.write(tmp_path / "halves.onnx").path)
    assert "offset" in [weight.name for weight in model.graph.initializer]
    assert {entries(node)[ORIGIN] for node in model.graph.node} == {"split", "mul", "add_tensor"}


# --- annotations --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_node_is_annotated_with_the_node_it_comes_from(
    gpt: Example, tmp_path: Path, dtype: torch.dtype | None
) -> None:
    if dtype is not None:
        contract_in(gpt.module, dtype)
    expected = {
        "Gemm": "aten.addmm.default",
        "MatMul": "aten.mm.default",
        "Attention": str(ATTENTION),
        "Cast": str(CONVERT),
        "Erf": "aten.erf.default",
        "Gather": "aten.embedding.default",
    }
    model = onnx.load(gpt.write(tmp_path / "gpt.onnx").path)

    origins = Counter(entries(node)[ORIGIN] for node in model.graph.node)
    assert "exporter" not in origins
    for node in model.graph.node:
        found = entries(node)
        assert found["node"] == found[ORIGIN]
        assert found["target"] == expected.get(node.op_type, found["target"])
    # Each fx node that computes must be found again, and none twice where it has one ONNX node.
    for fx_node in gpt.module.graph.nodes:
        if str(fx_node.target) in expected.values():
            assert origins[fx_node.name] == 1


def test_a_helper_node_says_that_it_is_the_exporters(tmp_path: Path) -> None:
    example = traced(lambda x: (aten.relu.default(x),) * 2, {}, x=torch.randn(3))
    model = onnx.load(example.write(tmp_path / "helper.onnx").path)

    found = {node.op_type: entries(node) for node in model.graph.node}
    assert found["Relu"] == {"node": "relu", "target": "aten.relu.default", ORIGIN: "relu"}
    assert found["Identity"] == found["Relu"] | {ORIGIN: "exporter"}


def test_a_node_without_annotation_still_names_its_origin(gpt: Example, tmp_path: Path) -> None:
    model = onnx.load(gpt.write(tmp_path / "gpt.onnx", annotations={"mm": {"k": "v"}}).path)
    found = [entries(node) for node in model.graph.node]
    assert {"k": "v", ORIGIN: "mm"} in found
    assert all(set(node) == {ORIGIN} for node in found if node[ORIGIN] != "mm")


def test_the_file_quotes_no_source_code(gpt: Example, tmp_path: Path) -> None:
    content = gpt.write(tmp_path / "gpt.onnx").path.read_bytes()
    for secret in (b"stack_trace", b"pkg.torch", b".py", str(tmp_path).encode()):
        assert secret not in content


# --- files --------------------------------------------------------------------------------------


def test_large_weights_lie_beside_the_model(gpt: Example, tmp_path: Path) -> None:
    contract_in(gpt.module, torch.bfloat16)
    for _ in range(2):  # a second export replaces both files
        report = gpt.write(tmp_path / "gpt.onnx", external_bytes=1000)
    weights = tmp_path / "gpt.onnx.data"

    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["gpt.onnx", weights.name]
    assert report.path.stat().st_size < weights.stat().st_size
    assert report.emulated_nodes == CONTRACTIONS
    weights.unlink()
    assert read_metadata(report.path) == {"plan": "everything"}


@pytest.mark.parametrize(
    ("name", "evaluator"), [("e4m3", "onnxruntime"), ("mxfp4", "onnx.reference")]
)
def test_narrow_weights_may_lie_beside_the_model(name: str, evaluator: str, tmp_path: Path) -> None:
    def product(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        scale = (-2, 4.0) if name == "e4m3" else (-2,)
        made: torch.Tensor = aten.mm.default(x, QUANTISE(weight, name, *scale))
        return made

    example = traced(product, {"fc.weight": torch.randn(64, 64)}, x=torch.randn(3, 64))
    report = example.write(tmp_path / "fc.onnx", external_bytes=100)
    assert report.evaluator == evaluator
    assert report.max_difference < 1e-5 * report.largest_output  # the order of float32 sums
    stored = onnx.load(report.path, load_external_data=False).graph.initializer
    codes = next(weight for weight in stored if weight.name.startswith("fc.weight.float"))
    assert codes.data_location == TensorProto.EXTERNAL
    assert (tmp_path / "fc.onnx.data").stat().st_size >= 64 * 64 * (1 if name == "e4m3" else 0.5)


def test_a_failed_check_leaves_the_old_file(
    gpt: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ExportError("no")

    path = tmp_path / "gpt.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(onnx_writer, "check_file", fail)
    with pytest.raises(ExportError, match="no"):
        gpt.write(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_metadata_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "note.onnx"
    path.write_text("not a model")
    with pytest.raises(ExportError, match=r"note\.onnx is not an ONNX model"):
        read_metadata(path)


# --- what is refused ----------------------------------------------------------------------------


@torch.library.custom_op("onnx_writer_test::odd", mutates_args=())
def odd(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@odd.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_operation_without_onnx_form_is_named(tmp_path: Path) -> None:
    example = traced(lambda x: odd(aten.relu.default(x)), {}, x=torch.randn(3))
    with pytest.raises(ExportError) as raised:
        example.write(tmp_path / "odd.onnx")
    assert str(raised.value) == (
        "node odd (onnx_writer_test.odd.default) cannot be written as ONNX: no ONNX translation"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_operation_that_cannot_be_traced_again_is_named(tmp_path: Path) -> None:
    heads = torch.randn(1, 2, 4, 8)
    example = traced(lambda x: ATTENTION(x, x, x)[1], {}, x=heads)  # the normaliser
    with pytest.raises(ExportError, match=r"^node getitem_1 \(.*tuple index out of range$"):
        example.write(tmp_path / "odd.onnx")


def test_an_operation_that_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    example = traced(aten.rand_like.default, {}, x=torch.randn(3))
    with pytest.raises(ExportError, match=r"cannot run .*RandomUniformLike.*origin=rand_like"):
        example.write(tmp_path / "random.onnx")


def test_a_lost_mask_is_noticed(gpt: Example, tmp_path: Path) -> None:
    contract_in(gpt.module, torch.bfloat16)
    path = gpt.write(tmp_path / "gpt.onnx").path
    for node in gpt.module.graph.find_nodes(op="call_function", target=ATTENTION):
        node.args = (*node.args[:4], False)
    gpt.module.recompile()
    feed = {given.name: given.example for given in gpt.inputs}
    with pytest.raises(ExportError, match=r"^output_0 differs by .* bf16 ulps\) is tolerated$"):
        check_file(path, gpt.module, gpt.arguments, feed)


def test_integers_must_agree_exactly(tmp_path: Path) -> None:
    example = traced(lambda x: aten.add.Tensor(x, 1), {}, x=torch.arange(3))
    path = example.write(tmp_path / "count.onnx").path
    other = traced(lambda x: aten.add.Tensor(x, 2), {}, x=torch.arange(3))
    with pytest.raises(ExportError, match="output_0 differs by 1 "):
        check_file(path, other.module, other.arguments, {"x": torch.arange(3)})


def test_a_placeholder_of_neither_kind_is_refused(gpt: Example, tmp_path: Path) -> None:
    missing = gpt.inputs[0].placeholder
    with pytest.raises(ExportError, match=f"placeholder {missing} must be exactly one of"):
        gpt.write(tmp_path / "gpt.onnx", inputs=[])


def test_two_things_of_one_name_are_refused(gpt: Example, tmp_path: Path) -> None:
    inputs = [replace(gpt.inputs[0], name="output_0")]
    with pytest.raises(ExportError, match="are called 'output_0'"):
        gpt.write(tmp_path / "gpt.onnx", inputs=inputs)
