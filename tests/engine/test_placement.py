"""Which nodes of a file compute in a narrow format: as good as the best of all subsets of them."""

import itertools
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from torch import nn

from precision_compiler.annotate.decision import captured_batches, decide_file
from precision_compiler.annotate.onnx_file import OnnxFile
from precision_compiler.annotate.placement import FP32, Placement, place, realised
from precision_compiler.annotate.rewrite import rewrite_file
from precision_compiler.budget import Budget
from precision_compiler.pipeline import silent
from precision_compiler.problem import Prices
from precision_compiler.target import Target
from tests.onnx_files import Norm, export, outlier_file


class Step(nn.Module):
    """A norm, two products that change the layout in between, and a residual: 12 nodes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = Norm(8)
        self.up, self.down = (nn.Linear(8, 8, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.up(self.norm(x))).transpose(1, 2)
        found: torch.Tensor = x + self.down(y)
        return found


def imported(path: Path, x: torch.Tensor) -> OnnxFile:
    model = ir.load(path)
    file, _, _ = captured_batches(model, path, [{"x": x}])
    return file


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> OnnxFile:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8)
    return imported(export(Step(), (x,), ["x"], tmp_path_factory.mktemp("step") / "m.onnx"), x)


def random_prices(file: OnnxFile, dice: random.Random) -> Prices:
    """Casts cost 3 and traffic: savings are below, at, and above that; some nodes lose."""
    products, stores = ({}, {})  # type: tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]
    for site in file.joint.sites:
        saving = dice.choice((0.0, 0.0, 0.2, 1.0, 3.0, 7.0, -0.5)) * 1e-6
        table = products if site.kind == "contraction" else stores
        table[site.name] = {FP32: 1e-5, "fp16": 1e-5 - saving}
    return Prices(products, stores, {})


def casts(file: OnnxFile, narrow: Iterable[ir.Node]) -> list[ir.Value]:
    """A value for every cast that a file needs whose other nodes compute in float32."""
    chosen, found = set(narrow), []
    values = [value for value in file.imported.dtypes if file.is_float(value)]
    for value in values:
        if file.is_constant(value) or file.root(value) is not value:
            continue
        made = value.producer() in chosen
        found += [value for wanted in {one in chosen for one in file.readers(value)} - {made}]
    return found


def seconds(file: OnnxFile, narrow: Iterable[ir.Node], prices: Prices, target: Target) -> float:
    chosen, total = set(narrow), 0.0
    for node in file.model.graph:
        fmt = "fp16" if node in chosen else FP32
        sites = [*file.products.get(str(node.name), ())]
        sites += [file.stores[name] for v in node.outputs if (name := str(v.name)) in file.stores]
        for site in sites:
            total += (prices.contractions | prices.stores)[site.name][fmt]  # type: ignore[operator]
    for value in casts(file, chosen):
        size = torch.Size(file.imported.sizes[value]).numel()
        total += target.launch_seconds
        total += target.read_seconds(4.0 * size) + target.write_seconds(2.0 * size)
    return total


@pytest.mark.parametrize("seed", range(6))
def test_no_other_subset_takes_less_time_nor_as_much_with_fewer_narrow_nodes(
    seed: int, step: OnnxFile
) -> None:
    dice = random.Random(seed)
    target = replace(Target.load("h100"), launch_seconds=dice.choice((0.0, 1e-6, 3e-6)))
    prices = random_prices(step, dice)
    everything = {site.name: "fp16" for site in step.joint.sites}
    chosen = set(place(step, everything, prices, target).compute)
    nodes = [node for node in step.model.graph if step.is_dynamic(node) and not step.passes(node)]
    best = seconds(step, chosen, prices, target)
    for count in range(len(nodes) + 1):
        for subset in itertools.combinations(nodes, count):
            other = seconds(step, subset, prices, target)
            assert other >= best - 1e-13, [node.name for node in subset]
            if count < len(chosen):
                assert other > best + 1e-14, [node.name for node in subset]


def test_the_casts_that_are_counted_are_those_that_are_written(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8)
    path = export(Step(), (x,), ["x"], tmp_path / "model.onnx")
    for seed in range(6):
        file, dice = imported(path, x), random.Random(seed)
        nodes = [n for n in file.model.graph if file.is_dynamic(n) and not file.passes(n)]
        narrow = [node for node in nodes if dice.random() < 0.5]
        expected = len(casts(file, narrow))
        rewrite_file(file, Placement(dict.fromkeys(narrow, "fp16"), {}), lambda *_: {})
        assert sum(node.op_type == "Cast" for node in file.model.graph) == expected


def test_what_does_not_pay_its_casts_is_float32_in_the_plan_too(step: OnnxFile) -> None:
    everything = {site.name: "fp16" for site in step.joint.sites}
    slow = replace(Target.load("h100"), launch_seconds=1.0)
    prices = random_prices(step, random.Random(0))
    none = place(step, everything, prices, slow)
    assert not none.compute
    assert set(realised(step, everything, none).values()) == {FP32}
    cheap = Prices(
        {name: {FP32: 10.0, "fp16": 0.0} for name in prices.contractions}, prices.stores, {}
    )
    both = realised(step, everything, place(step, everything, cheap, slow))
    assert {both[name] for name in prices.contractions} == {"fp16"}


def test_outliers_have_the_fewest_casts_that_their_products_allow(tmp_path: Path) -> None:
    path, x, _ = outlier_file(tmp_path / "model.onnx")
    model, target = ir.load(path), Target.load("h100")
    target = replace(target, formats={name: target.formats[name] for name in ("fp32", "fp16")})
    file, captured, _ = captured_batches(model, path, [{"x": torch.from_numpy(x)}])
    decision, placement = decide_file(
        file, captured, target, Budget.parse(1e-3), None, progress=silent
    )
    assignment = decision.unit.assignment
    products = [name for name, fmt in assignment.items() if name.endswith("fprop") and fmt != FP32]
    assert len(products) == 16
    # Whatever the plan allows beside these products: no other choice has fewer casts.
    allowed = {
        name: fmt
        if fmt != FP32
        else "fp16"
        if "fp16" in decision.unit.problem.options[name]
        else FP32
        for name, fmt in assignment.items()
        if name in decision.unit.links.stores
    } | {name: assignment[name] for name in decision.unit.links.contractions}
    forced = Prices(
        {name: {FP32: 1.0, "fp16": 0.0} for name in decision.unit.links.contractions},
        {name: {FP32: 0.0, "fp16": 0.0} for name in decision.unit.links.stores},
        {},
    )
    flat = replace(target, launch_seconds=1e-3, bandwidth=1e18)
    fewest = place(file, allowed, forced, flat)
    assert len(casts(file, placement.compute)) == len(casts(file, fewest.compute)) == 6
