"""One kernel for a normalisation or activation and its quantisation, where it moves fewer bytes."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from precision_compiler.budget import Budget
from precision_compiler.capture import Captured, capture
from precision_compiler.journal import Journal
from precision_compiler.lowering.products import SCALED_MM
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.passes import EMULATE, REWRITE
from precision_compiler.passes.lower.place_kernels import ACTIVATION, NORM
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.replay import gradients_of, relative_error
from tests import lowered_run

WIDTH = 64


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96)),
    "root mean square": lambda: nn.Sequential(RmsNorm(), nn.Linear(WIDTH, 96)),
    "gelu": lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH)),
    "swiglu": lambda: nn.Sequential(Gated()),
    "relu": lambda: nn.Sequential(nn.Linear(WIDTH, 96), nn.ReLU(), nn.Linear(96, WIDTH)),
    "residual": lambda: Residual(),
}


class Residual(nn.Module):
    """Others read the normalised tensor too, so it is written anyway, and one product alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = RmsNorm(), nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        made: Tensor = y.cos() + self.fc(y)
        return made


@cache
def found(name: str, rows: int = 16) -> Captured:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = MODELS[name]()
        x = torch.randn(4, rows, WIDTH)
        return capture(model, x, lambda output, given: output.square().mean())


def lowered(captured: Captured, store: str | None = None, architecture: str = "sm_100") -> Unit:
    """The graph for a GPU with every product in MXFP8 and tensors in a storage format."""
    sites = captured.joint.sites
    products = [site for site in sites if site.kind == "contraction" and site.op in ("mm", "addmm")]
    chosen = {site.name: "mxfp8" for site in products}
    chosen |= {site.name: store for site in sites if site.kind == "storage" and store is not None}
    joint = on_gpu(captured.joint)
    unit = Unit(
        joint, None, Budget.parse(1.0), Journal(), assignment=chosen, architecture=architecture
    )
    Pipeline(REWRITE, given=frozenset({"assignment"})).run(unit)
    return unit


def kernels(unit: Unit) -> list[object]:
    return [n.target for n in unit.joint.module.graph.nodes if n.target in (NORM, ACTIVATION)]


def notes(unit: Unit) -> str:
    return " ".join(e.message for e in unit.journal.entries if e.step == "place-kernels")


CASES = [
    ("layer norm", NORM),
    ("root mean square", NORM),
    ("gelu", ACTIVATION),
    ("swiglu", ACTIVATION),
]


@pytest.mark.parametrize("store", [None, "bf16"])
@pytest.mark.parametrize(("name", "kernel"), CASES)
def test_one_kernel_makes_both_orientations_and_the_emulated_numbers(
    name: str, kernel: Any, store: str | None
) -> None:
    captured = found(name)
    unit = lowered(captured, store)
    assert kernels(unit) == [kernel]
    assert "1 tensors are quantised by the kernel" in notes(unit)
    graph = unit.joint.module.graph
    (call,) = graph.find_nodes(op="call_function", target=kernel)
    assert {user.args[1] for user in call.users} == {0, 1, 2, 3}
    emulated = captured.joint.copy()
    twin = Unit(emulated, None, Budget.parse(1.0), Journal(), assignment=unit.assignment)
    Pipeline(EMULATE, given=frozenset({"assignment"})).run(twin)
    _, exact = gradients_of(captured)
    _, wanted = gradients_of(captured, emulated.module)
    _, actual = gradients_of(captured, unit.joint.module, run=lowered_run.run)
    rounding = relative_error(wanted, exact)
    assert rounding > 5e-3
    if store is None:
        assert relative_error(actual, wanted) < 0.05 * rounding
    else:  # one rounding less than planned
        assert relative_error(actual, exact) < 1.1 * rounding


def test_the_kernel_reads_what_is_stored_in_16_bits_as_it_is() -> None:
    unit = lowered(found("swiglu"), "bf16")
    (call,) = unit.joint.module.graph.find_nodes(op="call_function", target=ACTIVATION)
    inputs = [a for a in call.args if isinstance(a, fx.Node)]
    assert [node.meta["val"].dtype for node in inputs] == [torch.bfloat16] * 2


def test_the_product_reads_the_kernel_and_nothing_quantises_again() -> None:
    unit = lowered(found("layer norm"))
    graph = unit.joint.module.graph
    (kernel,) = graph.find_nodes(op="call_function", target=NORM)
    rows = next(user for user in kernel.users if user.args[1] == 0)
    assert any(user.target is SCALED_MM for user in rows.users)


@pytest.mark.parametrize(
    ("name", "rows", "architecture", "reason"),
    [
        ("relu", 16, "sm_100", "what makes them is no normalisation or activation"),
        ("residual", 16, "sm_100", "the kernel would move no fewer bytes"),
        ("layer norm", 12, "sm_100", "48 x 64 does not divide into blocks of 32 both ways"),
    ],
)
def test_elsewhere_the_journal_says_why_not(
    name: str, rows: int, architecture: str, reason: str
) -> None:
    unit = lowered(found(name, rows), architecture=architecture)
    assert not kernels(unit)
    assert reason in notes(unit)


def test_amd_has_scales_row_by_row() -> None:
    unit = lowered(found("layer norm"), architecture="gfx950")
    assert kernels(unit) == [NORM]
    captured, nvidia = found("layer norm"), lowered(found("layer norm"))
    _, wanted = gradients_of(captured, nvidia.joint.module, run=lowered_run.run)
    _, actual = gradients_of(captured, unit.joint.module, run=lowered_run.run)
    assert relative_error(actual, wanted) < 1e-6
