"""Plans for GPUs become graphs whose every product has the planned format; no GPU is needed."""

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from torch import nn

import precision_compiler
from precision_compiler.lowering.products import Lowered
from precision_compiler.plan import Plan
from precision_compiler.scaling import SCALED_FORMATS, hardware_format
from tests.models import Llama, made, planned

LENGTH, WORDS = 1024, 5003  # of which none divides the vocabulary


class Decoder(nn.Module):
    """Two layers as in Llama, wide enough for narrow products to pay; its head fits nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.Sequential(*(Llama(width, 16, 4, LENGTH) for _ in range(2)))
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.embed(tokens[:, :-1])))
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@cache
def lowered(target: str, budget: float, width: int = 2048) -> tuple[Plan, Lowered]:
    with torch.device("meta"):
        model, tokens = Decoder(width), torch.zeros(4, LENGTH + 1, dtype=torch.int64)
    plan = precision_compiler.make_plan(model, tokens, target=target, budget=budget)
    return plan, precision_compiler.lower(model, tokens, plan)


def contractions(plan: Plan) -> Mapping[str, str]:
    sites = plan.sites.items()
    return {name: choice.format for name, choice in sites if choice.kind == "contraction"}


def multiplied(name: str) -> str:
    """What a product says of its operands: not how these were rounded, only what they are."""
    row = SCALED_FORMATS.get(name)
    return row.base if row is not None and row.gradients == "stochastic" else name


@pytest.mark.parametrize(
    ("target", "budget", "width", "planned"),
    [
        ("h100", 0.15, 2048, {"e4m3"}),
        ("b200", 0.15, 2048, {"mxfp8"}),
        ("b200", 0.6, 8192, {"nvfp4_sr"}),
        ("mi300x", 0.15, 2048, {"e4m3fnuz"}),
        ("mi355x", 0.4, 2048, {"mxfp4_sr"}),
    ],
)
def test_every_product_has_exactly_the_planned_format(
    target: str, budget: float, width: int, planned: set[str]
) -> None:
    plan, found = lowered(target, budget, width)
    expected = {site: multiplied(name) for site, name in contractions(plan).items()}
    assert {product.site: product.format for product in found.products} == expected
    assert len(found.products) == len(expected)
    assert planned <= set(contractions(plan).values())
    assert not [note for note in found.notes if "emulated" in note]


def test_what_breaks_alignment_is_filled_up_or_kept_wide_with_the_reason() -> None:
    plan, found = lowered("h100", 0.15)
    assert hardware_format(contractions(plan)["head.fprop"]) == "e4m3"
    (product,) = (p for p in found.products if p.site == "head.fprop")
    row_scaled = {"e4m3": "_scaled_mm", "e4m3_row": "scaled_gemm"}  # rows: bf16 results alone
    assert product.operation == row_scaled[product.format]
    filled = [
        value
        for node in found.module.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor) and 5008 in value.shape
    ]
    assert torch.float8_e4m3fn in {value.dtype for value in filled}  # 5003 words in rows of 16
    blocks, _ = lowered("b200", 0.15)
    option = blocks.sites["head.dgrad"].options["mxfp8"]
    assert option.veto == "support: the sum over 5003 elements does not divide into blocks of 32"


def test_a_plan_of_another_model_is_refused() -> None:
    case = made("llama")
    with pytest.raises(precision_compiler.PlanMismatch, match="the plan has a site"):
        precision_compiler.lower(case.model, case.batch, planned("gpt"), loss=case.loss)
