"""Llama-shaped decoders of every published size, as workloads.

On the meta device a model of any size has no weights to hold: what is planned is the graph.
Use: precision-compiler plan benchmarks/llama.py:llama_70b --target h100
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from precision_compiler import Workload


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder: published dimensions, grouped-query attention, gated MLP."""

    layers: int
    width: int
    hidden: int
    heads: int
    groups: int
    vocabulary: int = 128256


SHAPES = {
    "tiny": Shape(2, 256, 704, 4, 2, 2048),
    "1b": Shape(16, 2048, 8192, 32, 8),
    "8b": Shape(32, 4096, 14336, 32, 8),
    "70b": Shape(80, 8192, 28672, 64, 8),
    "405b": Shape(126, 16384, 53248, 128, 8),
}
"""Dimensions of Llama 3 as in the models' own configuration files."""


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat((-second, first), -1) * sine


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.groups = shape.heads, shape.groups
        self.head = shape.width // shape.heads
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, shape.groups * self.head, bias=False)
        self.v = nn.Linear(shape.width, shape.groups * self.head, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, width = x.shape

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(batch, length, heads, self.head).transpose(1, 2)

        q = rotated(split(self.q(x), self.heads), cosine, sine)
        k = rotated(split(self.k(x), self.groups), cosine, sine)
        v = split(self.v(x), self.groups)
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return result


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.attention = Norm(shape.width), Attention(shape)
        self.norm2 = Norm(shape.width)
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cosine, sine)
        y = self.norm2(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Llama(nn.Module):
    """The decoder; called with tokens, it returns the loss of predicting the next one."""

    def __init__(self, shape: Shape, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        half = shape.width // shape.heads // 2
        rates = 500000.0 ** (-torch.arange(half, device="cpu") / half)
        angles = torch.outer(torch.arange(length, device="cpu").float(), rates).repeat(1, 2)
        where = self.norm.weight.device
        self.register_buffer("cosine", angles.cos().to(where), persistent=False)
        self.register_buffer("sine", angles.sin().to(where), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens[:, :-1])
        for layer in self.layers:
            x = layer(x, self.cosine, self.sine)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def llama(size: str, batch: int, length: int, device: str = "meta") -> Workload:
    """A workload of random tokens for a decoder of a published size."""
    with torch.device(device):
        model = Llama(SHAPES[size], length)
        tokens = torch.randint(SHAPES[size].vocabulary, (batch, length + 1))
    return Workload(model, [tokens])


def llama_8b() -> Workload:
    return llama("8b", 2, 8192)


def llama_70b() -> Workload:
    return llama("70b", 1, 8192)


def llama_405b() -> Workload:
    return llama("405b", 1, 8192)
