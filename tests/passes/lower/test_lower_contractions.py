"""Scaled products on GPUs: the planned format, the numbers of emulation, and nothing made twice."""

from collections import Counter

import pytest
import torch
from torch import Tensor, fx

from precision_compiler.budget import Budget
from precision_compiler.formats import CHOICES, FORMATS
from precision_compiler.graph import shape_of
from precision_compiler.journal import Journal
from precision_compiler.lowering.products import BLOCK_GEMM, SCALED_GEMM, SCALED_MM, products_of
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.passes import EMULATE, REWRITE
from precision_compiler.passes.lower.emulate_formats import EmulateFormats
from precision_compiler.passes.lower.lower_contractions import LowerContractions
from precision_compiler.passes.lower.spell_out_operands import SpellOutOperands
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.replay import gradients_of, relative_error
from precision_compiler.scaled import rounded
from precision_compiler.scaling import BLOCK_1X128_FP32, BLOCK_128X128_FP32, hardware_format
from precision_compiler.sites import operand_nodes
from precision_compiler.tf32 import TF32_MATMUL
from tests import lowered_run
from tests.helpers import graph, rewrite, unit_of
from tests.models import captured
from tests.random_graphs import inputs_of

HEAD = "x:f32[32,64] w:f32[64,48] v:f32[48]"
SCALED = ("e4m3", "e5m2", "mxfp8", "mxfp4", "nvfp4", "e4m3_row")
FOUR_BITS = ("nvfp4_2d", "nvfp4_sr", "nvfp4_rht", "mxfp4_sr", "mxfp4_rht")
MACHINES = {
    "sm_90": ("e4m3", "e5m2", "e4m3_row"),
    "sm_100": (*SCALED, *FOUR_BITS),
    "gfx942": ("e4m3fnuz",),
}
MACHINES |= {"gfx942": ("e4m3fnuz",), "gfx950": ("e4m3", "mxfp8", "mxfp4", "mxfp4_sr", "mxfp4_rht")}
Pairs = list[tuple[Tensor, Tensor]]
CASES = [(machine, fmt) for machine, formats in MACHINES.items() for fmt in formats]


def lowered(
    described: str,
    assignment: dict[str, str],
    architecture: str = "sm_100",
    parameters: tuple[str, ...] = (),
) -> Unit:
    """A graph on a GPU without contents, with casts inserted and products lowered."""
    unit = unit_of(graph(described), assignment, parameters=parameters)
    unit.joint, unit.architecture = on_gpu(unit.joint), architecture
    passes = (InsertCasts(), LowerContractions(), SpellOutOperands())
    Pipeline(passes, given=frozenset({"assignment"})).run(unit)
    return unit


def both(described: str, assignment: dict[str, str], architecture: str = "sm_100") -> Pairs:
    """What the lowered graph computes on random inputs, beside what the emulated one does."""
    unit = lowered(described, assignment, architecture)
    inputs = inputs_of(graph(described))
    found = lowered_run.results(unit.joint.module, inputs)
    emulated = rewrite(graph(described), assignment, EmulateFormats(everything=True))
    return list(zip(found, emulated.joint.module(*inputs), strict=True))


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for the order of float32 sums."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


def formats_of(module_graph: fx.Graph) -> dict[str, str]:
    return {product.site: product.format for product in products_of(module_graph)}


def calls(unit: Unit, target: object) -> list[fx.Node]:
    return [node for node in unit.joint.module.graph.nodes if node.target is target]


def notes(unit: Unit) -> str:
    return " ".join(str(entry) for entry in unit.journal.entries)


@pytest.mark.parametrize(("architecture", "fmt"), CASES)
def test_product_has_the_format_and_the_numbers_of_its_emulation(
    architecture: str, fmt: str
) -> None:
    described = f"{HEAD} | a = mm x w | b = addmm v x w | return a b"
    unit = lowered(described, {"a": fmt, "b": fmt}, architecture)
    multiplied = hardware_format(fmt) if fmt in FOUR_BITS else fmt
    assert list(formats_of(unit.joint.module.graph).values()) == [multiplied, multiplied]
    for found, expected in both(described, {"a": fmt, "b": fmt}, architecture):
        if fmt.endswith("_rht"):  # emulation rotates operands back: two more roundings of float32
            assert relative_error([found], [expected]) < 1e-6
        else:
            close(found, expected)


def test_blocks_of_128_and_square_ones_of_weights() -> None:
    described = "x:f32[32,384] w:f32[384,272] | a = mm x w | return a"
    unit = lowered(described, {"a": "e4m3_1x128"}, "sm_90", parameters=("w",))
    (call,) = calls(unit, SCALED_MM)
    scales = [one for one in call.args[2:4] if isinstance(one, fx.Node)]
    assert list(map(shape_of, scales)) == [(32, 3), (3, 3)]
    assert list(formats_of(unit.joint.module.graph).values()) == ["e4m3_1x128"]
    x, w = inputs_of(graph(described))
    (found,) = lowered_run.results(unit.joint.module, (x, w))
    narrow = FORMATS["e4m3"]
    expected = rounded(x, narrow, BLOCK_1X128_FP32) @ rounded(w, narrow, BLOCK_128X128_FP32)
    close(found, expected)


def test_a_row_scaled_product_comes_from_the_kernel_that_returns_its_dtype() -> None:
    described = f"{HEAD} | a = mm x w | b = neg a | return b"
    narrow = lowered(described, {"a": "e4m3_row", "a.store": "bf16"}, "sm_90")
    assert len(calls(narrow, SCALED_MM)) == 1
    wide = lowered(described, {"a": "e4m3_row"}, "sm_90")
    assert len(calls(wide, SCALED_GEMM)) == 1
    for unit in (narrow, wide):
        assert "e4m3_row" in formats_of(unit.joint.module.graph).values()


@pytest.mark.parametrize("fmt", SCALED)
def test_sizes_are_filled_up_and_the_result_is_cut(fmt: str) -> None:
    length = {"mxfp8": 96, "mxfp4": 96, "nvfp4": 48}.get(fmt, 41)
    described = f"x:f32[7,{length}] w:f32[{length},19] | a = mm x w | return a"
    ((found, expected),) = both(described, {"a": fmt})
    close(found, expected)


def test_elements_and_scales_are_made_once_per_operand_and_orientation() -> None:
    described = (
        "x:f32[32,64] w:f32[64,48] u:f32[64,16] g:f32[32,48]"
        " | y = neg x | a = mm y w | b = mm y u"
        " | t = t y | c@backward = mm t g | s = t y | d@backward = mm s g | return a b c d"
    )
    unit = lowered(described, dict.fromkeys("abcd", "e4m3"))
    module = unit.joint.module
    casts = [
        node
        for node in module.graph.nodes
        if (value := node.meta.get("val")) is not None
        and isinstance(value, torch.Tensor)
        and value.dtype == torch.float8_e4m3fn
        and node.args[0].meta["val"].dtype == torch.float32
    ]
    assert len(casts) == 5  # y in both orientations, w, u and g
    reductions = Counter(
        node.args[0].name
        for node in module.graph.nodes
        if node.target is torch.ops.aten.amax.default
    )
    assert reductions == {"y": 1, "w": 1, "u": 1, "g": 1}


def test_result_comes_in_the_format_it_is_stored_in() -> None:
    described = f"{HEAD} | a = mm x w | b = neg a | c = addmm v x w | return b c"
    chosen = {"a": "e4m3", "a.store": "bf16", "c": "e4m3", "c.store": "bf16"}
    unit = lowered(described, chosen)
    dtypes = [node.args[6] for node in calls(unit, SCALED_MM)]
    assert dtypes == [torch.bfloat16, torch.float32]  # the addend is added in float32
    for found, expected in both(described, chosen):
        assert relative_error([found], [expected]) < 2.0**-9  # a sum may round to the neighbour


def test_what_no_kernel_runs_is_emulated_with_the_reason() -> None:
    described = "x:f32[2,16,32] w:f32[2,32,16] | a = bmm x w | return a"
    unit = lowered(described, {"a": "e4m3"})
    assert not calls(unit, SCALED_MM)
    assert "is emulated in e4m3: scales are for products of two matrices" in notes(unit)
    unit = lowered(f"{HEAD} | a = mm x w | return a", {"a": "e4m3"}, "sm_80")
    assert "sm_80 has no 8-bit formats" in notes(unit)


def test_batches_of_tf32_products_are_lowered() -> None:
    described = "x:f32[2,16,32] w:f32[2,32,16] | a = bmm x w | return a"
    unit = lowered(described, {"a": "tf32"}, "sm_90")
    assert len(calls(unit, TF32_MATMUL)) == 1
    assert list(formats_of(unit.joint.module.graph).values()) == ["tf32"]


def test_on_the_cpu_nothing_is_lowered() -> None:
    unit = unit_of(graph(f"{HEAD} | a = mm x w | return a"), {"a": "e4m3"})
    assert not LowerContractions().run(unit)


@pytest.mark.parametrize(
    ("fmt", "architecture", "kernel"),
    [
        ("e5m2", "sm_90", SCALED_GEMM),
        ("e5m2fnuz", "gfx942", SCALED_GEMM),
        ("mxfp8", "gfx950", BLOCK_GEMM),
        ("e4m3", "", SCALED_MM),
    ],
)
def test_kernel_of_a_format(fmt: str, architecture: str, kernel: object) -> None:
    unit = lowered(f"{HEAD} | a = mm x w | return a", {"a": fmt}, architecture)
    assert len(calls(unit, kernel)) == 1


@pytest.mark.parametrize("model", ["gpt", "llama"])
@pytest.mark.parametrize("fmt", ["e4m3", "mxfp8", "nvfp4"])
def test_a_lowered_training_step_computes_the_emulated_gradients(model: str, fmt: str) -> None:
    found = captured(model)
    block = CHOICES[fmt].block or 1
    nodes = {node.name: node for node in found.joint.module.graph.nodes}
    products = {
        site.name: nodes[site.node]
        for site in found.joint.sites
        if site.kind == "contraction" and site.op in ("mm", "addmm")
    }
    lengths = {name: shape_of(operand_nodes(node)[0])[1] for name, node in products.items()}
    assignment = {name: fmt for name, length in lengths.items() if length % block == 0}
    assert len(assignment) > 10

    lowered_joint, emulated_joint = on_gpu(found.joint), found.joint.copy()
    for joint, passes in ((lowered_joint, REWRITE), (emulated_joint, EMULATE)):
        unit = Unit(
            joint, None, Budget.parse(1.0), Journal(), assignment=assignment, architecture="sm_100"
        )
        Pipeline(passes, given=frozenset({"assignment"})).run(unit)
    formats = formats_of(lowered_joint.module.graph)
    assert {name: formats[name] for name in assignment} == assignment
    _, wanted = gradients_of(found, emulated_joint.module)
    _, actual = gradients_of(found, lowered_joint.module, run=lowered_run.run)
    _, exact = gradients_of(found)
    rounding = relative_error(wanted, exact)
    assert rounding > 1e-2
    assert relative_error(actual, wanted) < 0.1 * rounding
