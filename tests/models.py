"""Small models that the broad tests run over, each with a batch and, where needed, a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from precision_compiler.budget import Budget
from precision_compiler.calling import Loss
from precision_compiler.capture import Captured, capture
from precision_compiler.compiler import plan_for
from precision_compiler.formats import CHOICES
from precision_compiler.plan import Plan
from precision_compiler.problem import fixes_result
from tests.helpers import machine


@dataclass(frozen=True)
class Case:
    """A model, a batch for it, and the loss where the model does not return one."""

    model: nn.Module
    batch: Any
    loss: Loss | None = None


@dataclass
class Output:
    """What models of the transformers library return, in short."""

    loss: Tensor
    logits: Tensor


class Mlp(nn.Module):
    """Two linear layers and a loss inside."""

    def __init__(self, width: int = 16, hidden: int = 64) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.down(F.gelu(self.up(x))), y)


class Attention(nn.Module):
    """Self-attention through the fused operation."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = split.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Block(nn.Module):
    """One Transformer block with layer normalisation first."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.fc = nn.Linear(width, 4 * width)
        self.proj = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attn(self.norm1(x)))
        x = x + self.dropout(self.proj(F.gelu(self.fc(self.norm2(x)))))
        return x


class Gpt(nn.Module):
    """Token and position embeddings, blocks, and a head that is the embedding again."""

    def __init__(
        self, width: int = 32, heads: int = 2, blocks: int = 2, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.position = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ self.embed.weight.T
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class Explicit(nn.Module):
    """Attention by matrix products and a softmax, under a padding mask."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            layer(x).view(shape).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None, None, :], -1e9).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        difference: Tensor = mixed - x
        return difference.square().mean()


class RmsNorm(nn.Module):
    """Division by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Llama(nn.Module):
    """Root-mean-square norm, rotated grouped-query attention, gated linear unit."""

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, length: int = 12) -> None:
        super().__init__()
        self.heads, self.groups, size = heads, groups, width // heads
        self.norm1, self.norm2 = RmsNorm(width), RmsNorm(width)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, groups * size, bias=False)
        self.v_proj = nn.Linear(width, groups * size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.gate_proj = nn.Linear(width, 3 * width, bias=False)
        self.up_proj = nn.Linear(width, 3 * width, bias=False)
        self.down_proj = nn.Linear(3 * width, width, bias=False)
        angles = torch.outer(torch.arange(length), 100.0 ** -(torch.arange(size // 2) * 2 / size))
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1))
        self.register_buffer("sin", torch.cat([angles.sin(), angles.sin()], -1))

    def rotated(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        y = self.norm1(x)
        q = self.q_proj(y).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.k_proj(y).view(batch, length, self.groups, -1).transpose(1, 2)
        v = self.v_proj(y).view(batch, length, self.groups, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            self.rotated(q), self.rotated(k), v, is_causal=True, enable_gqa=True
        )
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x)
        x = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return x


class Vit(nn.Module):
    """Patches by a convolution, a class token, one block."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.block = Block(width, 2, causal=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor, labels: Tensor) -> Output:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        logits = self.head(self.norm(self.block(x))[:, 0])
        return Output(F.cross_entropy(logits, labels), logits)


class Handwritten(nn.Module):
    """Linear layers without nn.Linear: parameters and matrix products alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 64) * 0.2)
        self.second = nn.Parameter(torch.randn(8, 64) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.first).tanh() @ self.second.T


def _tokens(batch: int, length: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randint(40, (batch, length)), torch.randint(40, (batch, length))


def mlp(batch: int = 32, hidden: int = 64) -> Case:
    return Case(Mlp(hidden=hidden), (torch.randn(batch, 16), torch.randn(batch, 16)))


def gpt(batch: int = 4, width: int = 32, length: int = 16, blocks: int = 2) -> Case:
    return Case(Gpt(width, blocks=blocks), _tokens(batch, length))


def dropout(batch: int = 4, width: int = 32) -> Case:
    tokens, labels = _tokens(batch)
    return Case(Gpt(width, blocks=1, dropout=0.3), {"tokens": tokens, "labels": labels})


def explicit(batch: int = 4, width: int = 32) -> Case:
    mask = torch.ones(batch, 12, dtype=torch.bool)
    mask[:, 9:] = False
    return Case(Explicit(width), {"x": torch.randn(batch, 12, width), "mask": mask})


def llama(batch: int = 4, width: int = 32) -> Case:
    def loss(output: Tensor, given: Tensor) -> Tensor:
        return (output - given.roll(1, 1)).square().mean()

    return Case(Llama(width), torch.randn(batch, 12, width), loss)


def vit(batch: int = 4, width: int = 32) -> Case:
    return Case(Vit(width), (torch.randn(batch, 3, 16, 16), torch.randint(10, (batch,))))


def handwritten(batch: int = 32) -> Case:
    def loss(output: Tensor, given: tuple[Tensor, ...]) -> Tensor:
        return F.cross_entropy(output, given[0].argmax(-1) % 8)

    return Case(Handwritten(), (torch.randn(batch, 16),), loss)


MODELS: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "gpt": gpt,
    "dropout": dropout,
    "explicit": explicit,
    "llama": llama,
    "vit": vit,
    "handwritten": handwritten,
}


def made(name: str) -> Case:
    """A fresh model by name, always with the same numbers."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return MODELS[name]()


@cache
def captured(name: str) -> Captured:
    """The captured graph of ``made(name)``, shared by all tests: none may change it."""
    case = made(name)
    return capture(case.model, case.batch, case.loss)


@cache
def planned(name: str) -> Plan:
    """A plan of a model for a target with round numbers, on the budget of autocast."""
    return plan_for(captured(name), machine(), Budget.parse("autocast"))


def everywhere(name: str, fmt: str) -> Plan:
    """A model's plan with a format wherever it can be."""
    plan = planned(name)
    fits = {
        site: fixes_result(fmt)
        or (
            choice.kind == "contraction"
            and (not CHOICES[fmt].block or choice.op in ("mm", "addmm", "bmm"))
        )
        for site, choice in plan.sites.items()
    }
    return plan.with_formats({site: fmt if fit else "fp32" for site, fit in fits.items()})
