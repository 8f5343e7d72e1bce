"""Where 8 bits are known not to pay, and where they do: plans for GPUs from models without weights.

Published slowdowns: linear layers of 1024 cubed and tiny models under dynamic fp8 scaling; key and
value projections after tensor parallelism has made them narrow; rowwise fp8 of a 70B model.
"""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import precision_compiler
from precision_compiler.formats import CHOICES
from precision_compiler.plan import Plan, SiteChoice

NARROW = tuple(name for name, fmt in CHOICES.items() if fmt.bits <= 8)
AMPLE = 0.2  # of error: only time decides


class Projection(nn.Module):
    """One linear layer behind a norm, as in a block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(inputs), nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = F.silu(self.fc(self.norm(x))).square().mean()
        return loss


class FeedForward(nn.Module):
    """A block's MLP with its norm and residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = (x + self.down(F.gelu(self.up(self.norm(x))))).square().mean()
        return loss


@cache
def planned(kind: str, sizes: tuple[int, int], tokens: int, target: str) -> Plan:
    with torch.device("meta"):
        model = {"projection": Projection, "mlp": FeedForward}[kind](*sizes)
        batch = torch.empty(tokens, sizes[0])
    return precision_compiler.make_plan(model, batch, target=target, budget=AMPLE)


def contractions(plan: Plan) -> dict[str, SiteChoice]:
    return {name: one for name, one in plan.sites.items() if one.kind == "contraction"}


@pytest.mark.parametrize("target", ["h100", "b200"])
@pytest.mark.parametrize(
    ("kind", "sizes", "tokens"),
    [
        ("projection", (1024, 1024), 1024),  # 1024 cubed
        ("mlp", (32, 32), 32),  # a 32 x 32 model
        ("projection", (8192, 128), 8192),  # a key projection, 8 ways parallel
        ("projection", (8192, 256), 4096),
    ],
)
def test_small_and_narrow_products_keep_16_bits_and_the_plan_says_why(
    kind: str, sizes: tuple[int, int], tokens: int, target: str
) -> None:
    found = contractions(planned(kind, sizes, tokens, target))
    assert len(found) >= 2
    for choice in found.values():
        assert choice.format not in NARROW
        options = {name: one for name, one in choice.options.items() if one.veto is None}
        faster = [n for n, one in options.items() if n in NARROW and one.seconds < choice.seconds]
        if faster:  # the product alone would be, but not with what it takes to get there
            assert "cost more in casts" in choice.reason


@pytest.mark.parametrize("target", ["h100", "b200"])
def test_big_feed_forward_layers_choose_narrow_formats_for_all_three_products(target: str) -> None:
    plan = planned("mlp", (8192, 28672), 16384, target)
    found = contractions(plan)
    assert {choice.role for choice in found.values()} == {"fprop", "dgrad", "wgrad"}
    assert all(choice.format in NARROW for choice in found.values())
    gain = plan.totals.autocast_seconds / plan.totals.predicted_seconds
    assert 1.3 < gain < (2.0 if target == "h100" else 4.0)  # the B200 has 4 bits as well


@pytest.mark.parametrize("target", ["a100", "v100"])
def test_what_the_hardware_lacks_is_no_option(target: str) -> None:
    plan = planned("mlp", (8192, 28672), 16384, target)
    for choice in contractions(plan).values():
        assert not set(NARROW) & set(choice.options)


@pytest.mark.parametrize("target", ["h100", "a100", "mi300x", "rtx4090", "l4"])
@pytest.mark.parametrize("kind", ["projection", "mlp"])
def test_no_plan_is_predicted_slower_than_float32_or_autocast(kind: str, target: str) -> None:
    for tokens in (32, 4096):
        totals = planned(kind, (1024, 4096), tokens, target).totals
        assert totals.predicted_seconds <= totals.fp32_seconds * (1 + 1e-9)
        assert totals.predicted_seconds <= totals.autocast_seconds * (1 + 1e-9)
