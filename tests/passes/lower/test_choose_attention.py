"""Attention in 16 bits runs on FlashAttention where it can, forward and backward together."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from precision_compiler import attention
from precision_compiler.budget import Budget
from precision_compiler.journal import Journal
from precision_compiler.lowering.products import FLASH, FLASH_BACKWARD, products_of
from precision_compiler.lowering.relocate import on_gpu
from precision_compiler.passes import REWRITE
from precision_compiler.passes.lower.choose_attention import ChooseAttention
from precision_compiler.pipeline import Pipeline, Unit
from precision_compiler.replay import gradients_of, relative_error
from tests import lowered_run
from tests.models import captured

EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


def lowered(name: str, forward: str, backward: str, flash: bool = True) -> Unit:
    found = captured(name)
    chosen = {
        site.name: backward if site.op == "attention_backward" else forward
        for site in found.joint.sites
        if site.op.startswith("attention") and site.kind == "contraction"
    }
    by_node = {site.node: site.name for site in found.joint.sites if site.kind == "storage"}
    for node in found.joint.module.graph.nodes:  # results come in the format of the operands
        parent = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.name in by_node and parent is not None and "attention" in str(parent.target):
            chosen[by_node[node.name]] = backward if "backward" in str(parent.target) else forward
    unit = Unit(
        on_gpu(found.joint), None, Budget.parse(1.0), Journal(), assignment=chosen,
        architecture="sm_90",
    )  # fmt: skip
    passes = [p for p in REWRITE if flash or not isinstance(p, ChooseAttention)]
    Pipeline(passes, given=frozenset({"assignment"})).run(unit)
    return unit


def targets(unit: Unit) -> list[object]:
    return [node.target for node in unit.joint.module.graph.nodes]


def run(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """FlashAttention by its formula; what it rounds inside is left out on both sides."""
    if node.target is FLASH:
        query, key, value, dropout, causal, _ = args
        made = attention.forward(_same, query, key, value, dropout, causal, **kwargs)
        return (*made, None, None, 0, 0, torch.zeros(2), torch.zeros(()), None)
    if node.target is FLASH_BACKWARD:
        grad, query, key, value, out, logsumexp, *_ = args
        given = (grad, query, key, value, out, logsumexp.to(grad.dtype), 0.0, args[11])
        return attention.backward(_same, *given, **kwargs)
    return lowered_run.run(node, args, kwargs)


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
def test_forward_and_backward_become_flash_with_the_same_numbers(fmt: str) -> None:
    unit, plain = lowered("gpt", fmt, fmt), lowered("gpt", fmt, fmt, flash=False)
    assert targets(unit).count(FLASH) == targets(unit).count(FLASH_BACKWARD) == 2
    assert EFFICIENT not in targets(unit)
    assert targets(plain).count(EFFICIENT) == 2
    formats = {p.site: p.format for p in products_of(unit.joint.module.graph)}
    assert formats == {p.site: p.format for p in products_of(plain.joint.module.graph)}
    assert list(formats.values()).count(fmt) == 4
    _, found = gradients_of(captured("gpt"), unit.joint.module, run=run)
    _, expected = gradients_of(captured("gpt"), plain.joint.module, run=run)
    assert relative_error(found, expected) < 1e-3


def test_different_formats_keep_what_was_captured() -> None:
    unit = lowered("gpt", "bf16", "fp16")
    assert FLASH not in targets(unit)
    notes = [entry.message for entry in unit.journal.entries if entry.step == "choose-attention"]
    assert any("forward and backward pass are in different formats" in note for note in notes)


def test_float32_attention_stays_without_a_word() -> None:
    unit = lowered("gpt", "fp32", "fp32")
    assert targets(unit).count(EFFICIENT) == 2
    assert not [e for e in unit.journal.entries if "memory-efficient" in e.message]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [(3, "bias", "it has a bias"), (5, 0.1, "it has dropout")],
)
def test_what_flash_does_not_take_is_left_with_the_reason(
    place: int, value: Any, reason: str
) -> None:
    unit = lowered("gpt", "bf16", "bf16", flash=False)
    graph = unit.joint.module.graph
    for node in graph.find_nodes(op="call_function", target=EFFICIENT):
        node.update_arg(place, node.args[0] if value == "bias" else value)
    again = replace(unit, journal=Journal())
    assert not ChooseAttention().run(again)
    assert all(reason in entry.message for entry in again.journal.entries)
    assert len(again.journal.entries) == 2
