"""ONNX graphs in torch: every operator against the reference, shapes folded, origins kept."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import fx

from precision_compiler.errors import OnnxImportError
from precision_compiler.export.onnx_emulation import run_file
from precision_compiler.importing import import_graph, joint_of
from precision_compiler.importing.table import OPERATORS
from precision_compiler.origin import origin_of
from tests.onnx_files import Array, Block, export, loaded, model_of, one_node, torch_batch

DICE = np.random.default_rng(0)


def floats(*shape: int) -> Array:
    return DICE.standard_normal(shape).astype(np.float32)


def ints(*numbers: Any) -> Array:
    return np.array(numbers, dtype=np.int64)


X, POSITIVE = floats(2, 3, 4), np.abs(floats(2, 3, 4)) + 0.1
MASK = X > 0
WHOLE = DICE.integers(-9, 9, (2, 3, 4))
BYTES = DICE.integers(-128, 127, (3, 4)).astype(np.int8)
SCALAR = np.array(0.5, dtype=np.float32)

# name: (inputs, constants, attributes), with "_" and a number behind names that come twice.
CASES: dict[str, tuple[dict[str, Array], dict[str, Array], dict[str, Any]]] = {
    **{
        name: ({"x": X}, {}, {})
        for name in (
            "Neg", "Abs", "Exp", "Erf", "Tanh", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh",
            "Sigmoid", "Relu", "Floor", "Ceil", "Round", "Sign", "IsNaN", "IsInf", "Softplus",
            "Softsign", "HardSwish", "Identity", "LeakyRelu", "Elu", "HardSigmoid", "Mish",
            "Softmax", "LogSoftmax", "LpNormalization", "Flatten", "Size", "Dropout",
        )
    },
    **{name: ({"x": POSITIVE}, {}, {}) for name in ("Log", "Sqrt", "Reciprocal", "Transpose")},
    **{
        name: ({"x": X, "y": POSITIVE}, {}, {})
        for name in (
            "Add", "Sub", "Mul", "Div", "Less", "LessOrEqual", "Greater", "GreaterOrEqual",
            "Equal", "Min", "Max", "Sum", "Mean", "PRelu",
        )
    },
    **{name: ({"x": MASK, "y": ~MASK}, {}, {}) for name in ("And", "Or", "Xor")},
    **{
        name: ({"x": POSITIVE}, {"axes": ints(1, -1)}, {"keepdims": 0})
        for name in (
            "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2",
            "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp",
        )
    },
    "Not": ({"x": MASK}, {}, {}),
    "BitwiseNot": ({"x": WHOLE}, {}, {}),
    "BitwiseAnd": ({"x": WHOLE, "y": WHOLE[::-1].copy()}, {}, {}),
    "BitwiseOr": ({"x": WHOLE, "y": WHOLE[::-1].copy()}, {}, {}),
    "Div_1": ({"x": WHOLE}, {"y": ints(4)}, {}),
    "Mod": ({"x": WHOLE}, {"y": ints(4)}, {}),
    "Mod_1": ({"x": X}, {"y": SCALAR}, {"fmod": 1}),
    "Pow": ({"x": X}, {"y": np.array(2, dtype=np.float32)}, {}),
    "Pow_1": ({"x": X, "y": WHOLE}, {}, {}),
    "Where": ({"c": MASK, "x": X}, {"y": SCALAR}, {}),
    "Where_1": ({"c": MASK}, {"x": SCALAR, "y": np.array([-1.5], dtype=np.float32)}, {}),
    "Clip": ({"x": X}, {"low": np.array(-0.5, dtype=np.float32), "high": SCALAR}, {}),
    "Cast": ({"x": 3 * X}, {}, {"to": onnx.TensorProto.INT32}),
    "Cast_1": ({"x": MASK}, {}, {"to": onnx.TensorProto.FLOAT}),
    "CastLike": ({"x": WHOLE, "like": X}, {}, {}),
    "ReduceSum": ({"x": X}, {}, {"noop_with_empty_axes": 1}),
    "ReduceSum_1": ({"x": WHOLE}, {"axes": ints(0)}, {}),
    "ArgMax": ({"x": X}, {}, {"axis": -1, "keepdims": 0}),
    "ArgMin": ({"x": X}, {}, {"axis": 1}),
    "CumSum": ({"x": X}, {"axis": np.array(1)}, {"exclusive": 1, "reverse": 1}),
    "CumSum_1": ({"x": X}, {"axis": np.array(-1)}, {}),
    "LayerNormalization": ({"x": X}, {"w": floats(4), "b": floats(4)}, {"epsilon": 1e-3}),
    "LayerNormalization_1": ({"x": X}, {"w": floats(3, 4)}, {"axis": 1}),
    "InstanceNormalization": ({"x": X}, {"w": floats(3), "b": floats(3)}, {}),
    "BatchNormalization": (
        {"x": X},
        {"w": floats(3), "b": floats(3), "m": floats(3), "v": POSITIVE[0, :, 0].copy()},
        {},
    ),
    "Shape": ({"x": X}, {}, {"start": 1}),
    "EyeLike": ({"x": X[0]}, {}, {}),
    "Reshape": ({"x": X}, {"s": ints(0, -1, 2)}, {}),
    "Transpose_1": ({"x": X}, {}, {"perm": [1, 2, 0]}),
    "Squeeze": ({"x": floats(1, 3, 1)}, {"axes": ints(-1)}, {}),
    "Squeeze_1": ({"x": floats(1, 3, 1)}, {}, {}),
    "Unsqueeze": ({"x": X}, {"axes": ints(0, -1)}, {}),
    "Expand": ({"x": floats(3, 1)}, {"s": ints(2, 1, 4)}, {}),
    "Slice": ({"x": X}, {"s": ints(0, -3), "e": ints(2**62, -1), "a": ints(1, 2)}, {}),
    "Slice_1": (
        {"x": X}, {"s": ints(-1), "e": ints(-(2**62)), "a": ints(2), "step": ints(-2)}, {}
    ),
    "Concat": ({"x": X, "y": POSITIVE}, {}, {"axis": -2}),
    "Tile": ({"x": X}, {"r": ints(1, 2, 3)}, {}),
    "Pad": ({"x": X}, {"p": ints(0, 1, 2, 0, 0, 1), "v": SCALAR}, {}),
    "Pad_1": ({"x": X}, {"p": ints(0, 0, 2, 0, 0, 1)}, {"mode": "reflect"}),
    "Pad_2": ({"x": X}, {"p": ints(0, 1, 0, 1, 2, 1)}, {"mode": "edge"}),
    "Gather": ({"x": X}, {"i": ints([0, -1], [2, 1])}, {"axis": 1}),
    "Gather_1": ({"x": X}, {"i": np.array(-1)}, {"axis": 2}),
    "Gather_2": ({"x": X, "i": ints([1, 0], [-1, 0])}, {}, {}),
    "GatherElements": ({"x": X}, {"i": DICE.integers(-3, 3, (2, 3, 4))}, {"axis": 1}),
    "GatherND": ({"x": X, "i": ints([1, 2], [0, -1])}, {}, {}),
    "GatherND_1": ({"x": X, "i": ints([1], [-1])}, {}, {"batch_dims": 1}),
    "ScatterND": ({"x": X, "i": ints([1], [0]), "u": floats(2, 3, 4)}, {}, {}),
    "ScatterElements": (
        {"x": X, "i": ints([[0, -1, 1, 2]]), "u": floats(1, 1, 4)}, {}, {"axis": 1}
    ),
    "OneHot": ({"i": ints(1, 0, -1)}, {"d": np.array(4), "v": floats(2)}, {}),
    "Trilu": ({"x": X}, {"k": np.array(1)}, {}),
    "Trilu_1": ({"x": X}, {}, {"upper": 0}),
    "DepthToSpace": ({"x": floats(1, 8, 2, 3)}, {}, {"blocksize": 2}),
    "DepthToSpace_1": ({"x": floats(1, 8, 2, 3)}, {}, {"blocksize": 2, "mode": "CRD"}),
    "MatMul": ({"x": X}, {"w": floats(4, 5)}, {}),
    "MatMul_1": ({"x": X, "y": floats(5, 1, 4, 3)}, {}, {}),
    "Gemm": ({"x": X[0]}, {"w": floats(5, 4), "b": floats(5)}, {"transB": 1}),
    "Gemm_1": ({"x": X[0]}, {"w": floats(3, 5), "b": floats(5)}, {"transA": 1, "alpha": 0.5}),
    "Einsum": ({"x": X, "y": floats(2, 4, 5)}, {}, {"equation": "bij,bjk->bki"}),
    "Conv": (
        {"x": floats(1, 4, 6, 7)},
        {"w": floats(6, 2, 3, 3), "b": floats(6)},
        {"group": 2, "strides": [2, 1], "pads": [0, 1, 2, 1], "dilations": [1, 2]},
    ),
    "Conv_1": ({"x": floats(1, 2, 7)}, {"w": floats(3, 2, 3)}, {"auto_pad": "SAME_UPPER"}),
    "MatMulInteger": (
        {"x": BYTES}, {"w": BYTES.T.copy(), "z": np.array(2, np.int8)}, {}
    ),
}  # fmt: skip

NEWER: dict[str, tuple[dict[str, Array], dict[str, Array], dict[str, Any], int]] = {
    "DequantizeLinear": (
        {"x": BYTES}, {"s": POSITIVE[0, 0].copy(), "z": np.array([1, 2, -3, 0], np.int8)}, {}, 19
    ),
    "DequantizeLinear_1": (
        {"x": BYTES}, {"s": POSITIVE[0, :, :2].copy()}, {"axis": 1, "block_size": 2}, 21
    ),
    "QuantizeLinear": ({"x": 50 * X}, {"s": SCALAR, "z": np.array(3, np.int8)}, {}, 19),
    "Gelu": ({"x": X}, {}, {}, 20),
    "Gelu_1": ({"x": X}, {}, {"approximate": "tanh"}, 20),
    "GroupNormalization": (
        {"x": floats(2, 4, 3)}, {"w": floats(4), "b": floats(4)}, {"num_groups": 2}, 21
    ),
    "RMSNormalization": ({"x": X}, {"w": floats(4)}, {}, 23),
    "RotaryEmbedding": (
        {"x": floats(2, 3, 5, 8)}, {"c": floats(2, 5, 4), "s": floats(2, 5, 4)}, {}, 23
    ),
    "RotaryEmbedding_1": (
        {"x": floats(2, 5, 24)},
        {"c": floats(9, 2), "s": floats(9, 2), "p": ints([0, 1, 2, 3, 4], [4, 5, 6, 7, 8])},
        {"num_heads": 3, "rotary_embedding_dim": 4, "interleaved": 1},
        23,
    ),
    "Attention": (
        {"q": floats(2, 4, 5, 8), "k": floats(2, 2, 6, 8), "v": floats(2, 2, 6, 8)}, {}, {}, 23
    ),
    "Attention_1": (
        {"q": floats(2, 5, 8), "k": floats(2, 5, 8), "v": floats(2, 5, 8)},
        {},
        {"q_num_heads": 2, "kv_num_heads": 2, "is_causal": 1, "scale": 0.3},
        23,
    ),
    "Attention_2": (
        {"q": floats(2, 2, 5, 8), "k": floats(2, 2, 5, 8), "v": floats(2, 2, 5, 8)},
        {"m": floats(5, 5)},
        {"is_causal": 1},
        23,
    ),
    "Swish": ({"x": X}, {}, {"alpha": 1.5}, 24),
}  # fmt: skip


def check(name: str, model: onnx.ModelProto, inputs: dict[str, Array]) -> None:
    wanted = ReferenceEvaluator(model).run(None, inputs)
    imported = import_graph(loaded(model), torch_batch(inputs))
    graph = imported.module(*imported.arguments) if _depends(name) else None
    for index, (found, exact) in enumerate(zip(imported.outputs.values(), wanted, strict=True)):
        torch.testing.assert_close(found, torch.from_numpy(np.array(exact)), atol=2e-6, rtol=2e-5)
        if graph is not None:
            torch.testing.assert_close(graph[index], found, atol=0, rtol=0, equal_nan=True)


def _depends(name: str) -> bool:
    return name not in ("Shape", "Size", "EyeLike")


@pytest.mark.parametrize("name", [name for name in CASES if _depends(name)])
def test_operator_computes_as_the_reference_does(name: str) -> None:
    inputs, constants, attributes = CASES[name]
    check(name, one_node(name.partition("_")[0], inputs, constants, **attributes), inputs)


@pytest.mark.parametrize("name", NEWER)
def test_newer_operator_computes_as_the_reference_does(name: str) -> None:
    inputs, constants, attributes, opset = NEWER[name]
    made = one_node(name.partition("_")[0], inputs, constants, opset=opset, **attributes)
    check(name, made, inputs)


def test_every_operator_of_the_table_is_tested() -> None:
    elsewhere = {"Constant", "ConstantOfShape", "Range", "NonZero", "Split", "TopK"}
    tested = {name.partition("_")[0] for name in (*CASES, *NEWER)} | elsewhere
    assert set(OPERATORS) == tested | {"DynamicQuantizeLinear"}


def test_several_outputs() -> None:
    for model in (
        one_node("Split", {"x": X}, {"s": ints(1, 3)}, outputs=2, axis=2),
        one_node("Split", {"x": X}, outputs=3, axis=2, num_outputs=3),
        one_node("TopK", {"x": X}, {"k": ints(2)}, outputs=2, axis=1),
        one_node("DynamicQuantizeLinear", {"x": X}, outputs=3),
    ):
        check("", model, {"x": X})


def shape_arithmetic() -> onnx.ModelProto:
    """Positions counted from the input's own length, as exporters write them."""
    node = helper.make_node
    value = onnx.numpy_helper.from_array(np.array([2], dtype=np.int64))
    nodes = [
        node("Shape", ["x"], ["size"], name="size"),
        node("Gather", ["size", "one"], ["length"], name="length"),
        node("Range", ["zero", "length", "one"], ["positions"], name="positions"),
        node("ConstantOfShape", ["size"], ["twos"], value=value, name="twos"),
        node("Cast", ["twos"], ["float_twos"], to=1, name="float_twos"),
        node("NonZero", ["twos"], ["where"], name="where"),
        node("Gather", ["where", "zero"], ["rows"], name="rows"),
        node("Constant", [], ["half"], value_float=0.5, name="half"),
        node("Gather", ["table", "positions"], ["embedded"], name="embedded"),
        node("Add", ["x", "embedded"], ["moved"], name="moved"),
        node("Mul", ["moved", "float_twos"], ["doubled"], name="doubled"),
        node("Mul", ["doubled", "half"], ["y"], name="y"),
    ]
    constants = {
        "one": np.array(1, dtype=np.int64),
        "zero": np.array(0, dtype=np.int64),
        "table": floats(9, 6),
    }
    return model_of(nodes, {"x": floats(4, 5, 6)}, ["y", "rows"], constants)


def test_shape_arithmetic_leaves_no_trace() -> None:
    model, x = shape_arithmetic(), floats(4, 5, 6)
    imported = import_graph(loaded(model), torch_batch({"x": x}))
    calls = [node for node in imported.module.graph.nodes if node.op == "call_function"]
    assert [origin.node for node in calls if (origin := origin_of(node))] == [
        "moved", "doubled", "y",
    ]  # fmt: skip
    wanted = ReferenceEvaluator(model).run(None, {"x": x})
    for found, exact in zip(imported.outputs.values(), wanted, strict=True):
        torch.testing.assert_close(found, torch.from_numpy(np.array(exact)))


def test_tagged_nodes_compute_the_values_they_name() -> None:
    """The captured graph, run node by node, against every value of the file."""
    torch.manual_seed(0)
    model, x = _block(), floats(2, 8, 16)
    imported = import_graph(loaded(model), torch_batch({"x": x}))
    joint = joint_of(imported)
    for value in [out for node in model.graph.node for out in node.output]:
        if value not in {out.name for out in model.graph.output}:
            model.graph.output.append(onnx.ValueInfoProto(name=value))
    names = [out.name for out in model.graph.output]
    every = dict(zip(names, ReferenceEvaluator(model).run(None, {"x": x}), strict=True))
    seen = _values(joint.module, joint.inputs)
    tags = {node: origin_of(node) for node in seen if node.op == "call_function"}
    assert all(tag is not None for tag in tags.values())
    made = {tag.value: seen[node] for node, tag in tags.items() if tag and tag.value and tag.node}
    for name, found in made.items():
        exact = torch.from_numpy(np.array(every[name]))
        torch.testing.assert_close(found.reshape(exact.shape), exact, atol=1e-5, rtol=1e-4)
    products = {node.output[0] for node in model.graph.node if node.op_type == "MatMul"}
    assert products <= set(made)


def _block() -> onnx.ModelProto:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = Path(folder, "block.onnx")
        return onnx.load(export(Block(16), (torch.randn(2, 8, 16),), ["x"], path))


def _values(module: fx.GraphModule, inputs: list[Any]) -> dict[fx.Node, Any]:
    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    seen: dict[fx.Node, Any] = {}
    with torch.no_grad():
        Recorder(module).run(*inputs)
    return seen


@pytest.mark.parametrize(("opset", "dynamo"), [(18, True), (20, True), (23, True), (17, False)])
def test_exported_block_agrees_with_onnxruntime(opset: int, dynamo: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 16)
    path = export(Block(16), (x,), ["x"], tmp_path / "block.onnx", opset, dynamo)
    imported = import_graph(loaded(onnx.load(path)), {"x": x})
    (wanted,) = run_file(path, {"x": x}).outputs
    torch.testing.assert_close(next(iter(imported.outputs.values())), wanted, atol=2e-5, rtol=1e-5)


def refusal(model: onnx.ModelProto, batch: dict[str, Array]) -> str:
    with pytest.raises(OnnxImportError) as caught:
        import_graph(loaded(model), torch_batch(batch))
    return str(caught.value)


def test_what_cannot_be_imported_is_named() -> None:
    batch = {"x": X}
    assert "node the_node: the operator Det is not supported" in refusal(
        one_node("Det", {"x": floats(2, 3, 3)}), {"x": floats(2, 3, 3)}
    )
    opaque = one_node("Relu", batch)
    opaque.graph.node[0].domain = "com.microsoft"
    assert "com.microsoft.Relu" in refusal(opaque, batch)
    assert "opset 11, not 13 to 24" in refusal(one_node("Relu", batch, opset=11), batch)
    depends = one_node("Reshape", {"x": X, "s": ints(6, 4)})
    assert "node the_node (Reshape): its input s decides shapes" in refusal(
        depends, {"x": X, "s": ints(6, 4)}
    )
    unused = one_node("Relu", batch)
    del unused.graph.node[:]
    unused.graph.output[0].name = "c"
    unused.graph.initializer.append(onnx.numpy_helper.from_array(X, "c"))
    assert "no output of the model depends on its inputs" in refusal(unused, batch)


def test_data_that_does_not_fit_is_named() -> None:
    model = one_node("Relu", {"x": X})
    assert "lacks the input x" in refusal(model, {})
    assert "the batch has z" in refusal(model, {"x": X, "z": X})
    assert "input x is torch.float32 in the model, torch.float64" in refusal(
        model, {"x": X.astype(np.float64)}
    )
    assert "input x has shape [2, 3, 4] in the model, [2, 3]" in refusal(model, {"x": X[..., 0]})
