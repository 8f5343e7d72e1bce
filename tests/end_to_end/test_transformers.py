"""Models of the transformers library work unchanged."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

import precision_compiler

VOCABULARY = 96


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=32,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        vocab_size=VOCABULARY, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCABULARY, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("make", [gpt2, bert, llama])
def test_a_transformers_model_trains(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = make()
    tokens = torch.randint(0, VOCABULARY, (4, 16))
    batch = {"input_ids": tokens, "labels": tokens}
    if make is bert:
        lengths = torch.tensor([16, 9, 12, 16])
        batch["attention_mask"] = (torch.arange(16) < lengths[:, None]).long()
    plan = precision_compiler.make_plan(model, batch, target="h100", budget=0.05)
    assert any(choice.format != "fp32" for choice in plan.sites.values())
    precision_compiler.compile(model, batch, plan=plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
