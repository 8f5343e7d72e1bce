"""Recipes: further ways to make the operands of a format's products, chosen like formats."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import precision_compiler
from precision_compiler import packing
from precision_compiler.budget import Budget
from precision_compiler.compiler import Decision, decide
from precision_compiler.emulation import QUANTISE
from precision_compiler.errors import ExportError, TargetError
from precision_compiler.export.operand_rounding import prepare_rounding
from precision_compiler.formats import CHOICES, FORMATS, choice_named, quantised
from precision_compiler.graph import root_of
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.operand_errors import OperandErrors
from precision_compiler.passes.lower.emulate_formats import EmulateFormats
from precision_compiler.passes.lower.lower_contractions import LowerContractions
from precision_compiler.passes.rewrite.insert_casts import InsertCasts
from precision_compiler.pipeline import Pipeline
from precision_compiler.sampling import sampled, sampled_places
from precision_compiler.scaling import (
    RECIPES,
    SCALED_FORMATS,
    Content,
    hardware_format,
    reason_against_recipe,
)
from precision_compiler.sites import provenance_of
from precision_compiler.target import Target
from precision_compiler.verification import emulated
from tests.helpers import graph, rewrite, unit_of
from tests.models import captured, made
from tests.random_graphs import inputs_of

DRAWS = 400
HOPPER, BLACKWELL = ("e4m3_row", "e4m3_1x128"), ("nvfp4_2d", "nvfp4_sr", "nvfp4_rht")
CDNA4 = ("mxfp4_sr", "mxfp4_rht")


@cache
def decided(machine: str, recipes: tuple[str, ...], limit: float = 0.2) -> Decision:
    known = Target.load(machine).with_recipes(*recipes)
    fast = replace(known, launch_seconds=0.0, issue_seconds=0.0, bandwidth=1e16, units=None)
    return decide(captured("gpt"), fast, Budget.parse(limit))


def test_every_recipe_has_a_format_with_instructions_under_it() -> None:
    assert set(RECIPES) == {*HOPPER, *BLACKWELL, *CDNA4}
    for name in RECIPES:
        base = hardware_format(name)
        assert base != name
        assert hardware_format(base) == base
        assert SCALED_FORMATS[name].element.bits == CHOICES[base].bits


def test_a_row_has_the_scale_of_its_largest_number() -> None:
    x = torch.randn(4, 96) * torch.tensor([[1e-3], [1.0], [50.0], [1e4]])
    found = quantised(x, choice_named("e4m3_row"))
    for row, rounded in zip(x, found, strict=True):
        assert rounded.abs().max() == pytest.approx(float(row.abs().max()), rel=1e-6)
        error = (rounded - row).norm() / row.norm()
        assert 0.01 < error < 0.04  # whatever its size; under one scale the first row vanishes
    assert not quantised(x, choice_named("e4m3"))[0].any()


def test_weights_are_scaled_in_squares_and_nothing_else_is() -> None:
    x = torch.randn(256, 256)
    x[:128, :128] *= 100
    fmt = choice_named("e4m3_1x128")
    weight = quantised(x, fmt, content="weight")
    assert not torch.equal(weight, quantised(x, fmt))
    assert torch.equal(quantised(x.t(), fmt, axis=-2, content="weight").t(), weight)
    assert torch.equal(quantised(x, fmt), quantised(x, fmt, content="gradient"))


def test_gradients_alone_are_rounded_stochastically_and_without_bias() -> None:
    x, fmt = torch.randn(8, 64), choice_named("nvfp4_sr")
    assert torch.equal(quantised(x, fmt), quantised(x, choice_named("nvfp4")))
    dice = torch.Generator().manual_seed(0)
    draws = [quantised(x, fmt, content="gradient", generator=dice) for _ in range(DRAWS)]
    mean = torch.stack(draws).mean(0)
    inside = x.abs() < 0.95 * x.abs().amax(1, keepdim=True)  # what saturates is biased
    nearest = quantised(x, fmt) - x
    assert (mean - x)[inside].norm() < 0.2 * nearest[inside].norm()
    assert (draws[0] - x).norm() > 1.2 * nearest.norm()


def test_torchs_seed_decides_what_is_drawn() -> None:
    x, fmt = torch.randn(8, 64), choice_named("nvfp4_sr")
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(quantised(x, fmt, content="gradient"))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_rotation_spreads_an_outlier_and_keeps_the_product() -> None:
    x, y = torch.randn(32, 64), torch.randn(64, 32)
    x[:, ::16] *= 30
    exact, errors = x @ y, {}
    for name in ("nvfp4", "nvfp4_rht"):
        fmt = choice_named(name)
        product = quantised(x, fmt, axis=-1) @ quantised(y, fmt, axis=-2)
        errors[name] = float((product - exact).norm() / exact.norm())
    assert errors["nvfp4_rht"] < 0.2
    small = x.clone()
    small[:, ::16] = 0  # what the outliers drown without a rotation
    kept = {
        name: float((quantised(x, choice_named(name)) - x)[small != 0].norm() / small.norm())
        for name in ("mxfp4", "nvfp4_rht")
    }
    assert kept["nvfp4_rht"] < kept["mxfp4"]


@pytest.mark.parametrize(
    ("name", "role", "length", "reason"),
    [
        ("nvfp4_rht", "fprop", 64, "recipe for wgrad"),
        ("nvfp4_sr", "fprop", 64, "recipe for dgrad and wgrad"),
        ("nvfp4_rht", "wgrad", 40, "tiles of 16"),
        ("e4m3_1x128", "fprop", 128, "the whole row"),
        ("nvfp4_rht", "wgrad", 64, ""),
        ("e4m3_row", "dgrad", 41, ""),
        ("bf16", "fprop", 1, ""),
    ],
)
def test_products_that_a_recipe_is_for(name: str, role: str, length: int, reason: str) -> None:
    found = reason_against_recipe(name, role, length)
    assert reason in found if reason else not found


@pytest.mark.parametrize(
    ("machine", "recipes"), [("h100", HOPPER), ("b200", BLACKWELL), ("mi355x", CDNA4)]
)
def test_plans_choose_among_recipes_where_they_are_meant(
    machine: str, recipes: tuple[str, ...]
) -> None:
    unit = decided(machine, recipes).unit
    sites = unit.problem.links.contractions
    for name in recipes:
        wanted = SCALED_FORMATS[name].roles or ("fprop", "dgrad", "wgrad")
        offered = {sites[site].role for site in sites if name in unit.problem.options[site]}
        assert offered <= set(wanted)
    assert any(set(options) & set(recipes) for options in unit.problem.options.values())


def test_no_format_of_four_bits_rounds_gradients_to_nearest_beside_a_recipe() -> None:
    """Not in NVFP4, which the recipe is for, and not in MXFP4 instead."""
    for recipes, vetoed in ((("nvfp4_sr",), True), ((), False)):
        unit = decided("b200", recipes).unit
        sites = unit.problem.links.contractions
        for name in ("nvfp4", "mxfp4"):
            biased = {
                sites[site].role
                for (site, fmt), reason in unit.vetoes.items()
                if fmt == name and reason.startswith("bias")
            }
            assert biased == ({"dgrad", "wgrad"} if vetoed else set())


def test_emulation_knows_weights_from_gradients() -> None:
    decision = decided("b200", BLACKWELL)
    problem = decision.unit.problem
    chosen = problem.uniform()
    for site, options in problem.options.items():
        chosen[site] = next((name for name in BLACKWELL if name in options), "fp32")
    joint = decision.captured.joint
    module = emulated(decision.captured, chosen)
    provenance = provenance_of(module.graph, joint.parameters)
    seen = set()
    for node in module.graph.find_nodes(op="call_function", target=QUANTISE):
        source, name, _, _, content = node.args
        assert content == provenance.content(root_of(source))
        seen.add((name, content))
    assert {("nvfp4_2d", "weight"), ("nvfp4_2d", "activation"), ("nvfp4_2d", "gradient")} <= seen


CHAIN = (
    "x:f32[64,64] w:f32[64,64] u:f32[64,64] tangents_1:f32[64,64] | a = mm x w | b = mm a u"
    " | g@backward = mm tangents_1 u | h@backward = mm g w | return b h"
)
STORED = {"g": "nvfp4_sr", "g.store": "bf16", "h": "nvfp4_sr"}
"""A gradient that a product makes, a copy rounds, and another product reads."""


def test_a_rounded_copy_of_a_gradient_is_a_gradient() -> None:
    unit = unit_of(graph(CHAIN), STORED, parameters=("w", "u"))
    emulate = EmulateFormats(everything=True)
    Pipeline((emulate,), given=frozenset({"assignment"})).run(unit)
    calls = unit.joint.module.graph.find_nodes(op="call_function", target=QUANTISE)
    contents = [node.args[4] for node in calls if node.args[1] == "nvfp4_sr"]
    assert sorted(contents) == ["gradient", "gradient", "weight", "weight"]


def test_what_a_lowered_product_makes_is_a_gradient() -> None:
    unit = unit_of(graph(CHAIN), STORED, parameters=("w", "u"))
    unit.joint, unit.architecture = on_gpu(unit.joint), "sm_100"
    passes = (InsertCasts(), LowerContractions())
    Pipeline(passes, given=frozenset({"assignment"})).run(unit)
    calls = unit.joint.module.graph.find_nodes(op="call_function", target=packing.block_operand)
    assert sorted(node.args[4] for node in calls) == ["gradient", "gradient", "weight", "weight"]


def test_a_recipe_by_hand_is_an_override() -> None:
    case = made("gpt")
    target = replace(
        Target.load("b200"), launch_seconds=0.0, issue_seconds=0.0, bandwidth=1e16, units=None
    )
    plan = precision_compiler.make_plan(
        case.model, case.batch, target=target, budget=0.3, overrides={"*.fc.wgrad": "nvfp4_rht"}
    )
    forced = [choice for name, choice in plan.sites.items() if name.endswith(".fc.wgrad")]
    assert {choice.format for choice in forced} == {"nvfp4_rht"}
    assert all(choice.error > 0 for choice in forced)


@pytest.mark.parametrize("name", RECIPES)
def test_the_operation_is_what_torch_takes_it_for(name: str) -> None:
    x = torch.randn(32, 48)
    for given, axis in ((x, -1), (x.t(), -2), (torch.randn(4, 16, 32).transpose(0, 1), -1)):
        torch.library.opcheck(QUANTISE, (given, name, axis, None, "weight"))


@pytest.mark.parametrize("name", [name for name in SCALED_FORMATS if not name.endswith("_rht")])
@pytest.mark.parametrize("content", ["weight", "activation"])
def test_errors_of_a_sample_are_those_of_the_whole(name: str, content: Content) -> None:
    x = torch.randn(3, 40, 320) * torch.logspace(-2, 2, 320)
    for root, shown in (
        (x, x.view(120, 320).t()),
        (x.transpose(0, 1), x),
        (x[0], x[0].t()),
    ):
        for axis in (-1, -2):
            places = sampled_places(root, shown, 500)
            assert places is not None
            how = SCALED_FORMATS[name]
            few = OperandErrors(shown, places, axis, content)
            few.of(SCALED_FORMATS["nvfp4"])  # whose small blocks larger ones are then made of
            found = few.of(how)
            whole = quantised(shown, choice_named(name), axis=axis, content=content) - shown
            assert torch.equal(found, whole[places.coordinates])
            assert torch.equal(sampled(root, 500), shown[places.coordinates])
            assert torch.equal(places.of(shown), shown[places.coordinates])
            second = sampled_places(root, shown, 500, every=2)
            assert second is not None
            assert torch.equal(second.of(shown), sampled(root, 500)[::2])


def test_a_copy_or_a_part_has_no_places() -> None:
    x = torch.randn(8, 8)
    assert sampled_places(x, x.clone()) is None
    assert sampled_places(x, x[:4]) is None
    assert sampled_places(x, x[:1].expand(8, 8)) is None


def test_unknown_recipes_and_those_without_a_format_are_refused() -> None:
    with pytest.raises(TargetError, match=r"unknown recipe 'e4m3_rows' \(did you mean 'e4m3_row'"):
        Target.load("h100").with_recipes("e4m3_rows")
    with pytest.raises(TargetError, match="nvfp4_sr needs the format nvfp4"):
        Target.load("h100").with_recipes("nvfp4_sr")


def test_rates_of_recipes_are_those_of_their_format_with_their_scales() -> None:
    hopper = Target.load("h100")
    row, blocks, plain = (hopper.rate(name) for name in ("e4m3_row", "e4m3_1x128", "e4m3"))
    assert row == plain
    assert (blocks.block, blocks.scale_bytes) == (128, 4)
    assert blocks.flops == pytest.approx(plain.flops * plain.block_fraction)
    assert blocks.flops < plain.flops


def test_rounding_of_recipes_along_the_sum() -> None:
    described = "x:f32[8,256] w:f32[256,16] | a = mm x w | return a"
    module = rewrite(graph(described), {"a": "e4m3_row"}, EmulateFormats(everything=True))
    x, w = inputs_of(graph(described))
    (found,) = module.joint.module(x, w)
    scale = [448 / t.abs().amax(axis, keepdim=True) for t, axis in ((x, 1), (w, 0))]
    dtype = FORMATS["e4m3"].dtype
    assert dtype is not None
    codes = [(t * s).to(dtype).float() / s for t, s in zip((x, w), scale, strict=True)]
    torch.testing.assert_close(found, codes[0] @ codes[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("recipe", "message"), [("e4m3_1x128", r"square blocks.*e4m3"), ("nvfp4_2d", "square.*nvfp4")]
)
def test_square_blocks_have_no_onnx_form(recipe: str, message: str) -> None:
    described = "x:f32[8,256] w:f32[256,16] | a = mm x w | return a"
    unit = unit_of(graph(described), {"a": recipe}, parameters=("w",))
    Pipeline((EmulateFormats(),), given=frozenset({"assignment"})).run(unit)
    with pytest.raises(ExportError, match=message):
        prepare_rounding(unit.joint.module, inputs_of(graph(described)))


def test_rows_leave_as_onnx(tmp_path: Path) -> None:
    case = made("gpt")
    target = replace(
        Target.load("h100"), launch_seconds=0.0, issue_seconds=0.0, bandwidth=1e16, units=None
    )
    plan = precision_compiler.make_plan(
        case.model, case.batch, target=target, budget=0.3, overrides={"*.fc.fprop": "e4m3_row"}
    )
    report = precision_compiler.export_onnx(case.model, case.batch, plan, tmp_path / "model.onnx")
    assert report.evaluator in ("onnxruntime", "onnx.reference")
    said = (tmp_path / "model.onnx").read_bytes()
    assert b"of rows, from their largest magnitude" in said
