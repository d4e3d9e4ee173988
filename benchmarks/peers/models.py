"""Two small networks with data, a few steps after their first weights: what all libraries measure.

Both are written in operators that every library can differentiate twice, and forwards: attention is
two matrix products and a softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Workload:
    """A network in eval mode, batches of equal size, and the layers whose traces are wanted.

    Attributes:
        name: what the tables call it.
        model: inputs -> logits (B, ..., C).
        batches: (inputs, targets).
        layers: names of modules, each with a `weight`.
        loss: after training.
    """

    name: str
    model: nn.Module
    batches: list[Batch]
    layers: list[str]
    loss: float

    def weight(self, layer: str) -> nn.Parameter:
        """Return a layer's weight."""
        return self.model.get_parameter(f"{layer}.weight")


class TokenLoss(nn.CrossEntropyLoss):
    """Mean cross-entropy over all predictions of logits (B, ..., C)."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Return the mean over the examples and positions."""
        return super().forward(z.flatten(0, -2), y.flatten())


def transformer(
    *,
    blocks: int = 6,
    width: int = 128,
    sequences: int = 4,
    length: int = 32,
    vocabulary: int = 128,
    steps: int = 60,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Return a decoder as GPT-2 is one, trained a little on a Markov chain."""
    generator = torch.Generator().manual_seed(0)
    model = _drawn(_Decoder(blocks, width, vocabulary, length), generator)
    chain = torch.softmax(3 * torch.randn(vocabulary, vocabulary, generator=generator), -1)

    def batch() -> Batch:
        tokens = torch.randint(0, vocabulary, (sequences, 1), generator=generator)
        for _ in range(length):
            following = torch.multinomial(chain[tokens[:, -1]], 1, generator=generator)
            tokens = torch.cat([tokens, following], 1)
        return tokens[:, :-1], tokens[:, 1:]

    loss = _train(model, batch, steps, rate=1e-3)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    return Workload("transformer", model.to(dtype).eval(), [batch()], layers, loss)


def resnet(
    *,
    width: int = 16,
    images: int = 128,
    size: int = 16,
    classes: int = 10,
    steps: int = 60,
    batches: int = 1,
    smooth: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Workload:
    """Return a ResNet-8 with batch norm, trained a little on noisy pictures of each class.

    Args:
        width: channels of the first stage; twice and four times as many follow.
        images: of a batch.
        size: of a picture's side.
        classes: how many.
        steps: of training.
        batches: that the loss is over.
        smooth: SiLU in the place of ReLU.
        dtype: of the weights.
    """
    generator = torch.Generator().manual_seed(1)
    model = _drawn(_ResNet(width, classes, nn.SiLU if smooth else nn.ReLU), generator)
    patterns = torch.randn(classes, 3, size, size, generator=generator)

    def batch() -> Batch:
        y = torch.randint(0, classes, (images,), generator=generator)
        noise = torch.randn(images, 3, size, size, generator=generator)
        return 0.5 * patterns[y] + noise, y

    loss = _train(model, batch, steps, rate=2e-3)
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    data = [(x.to(dtype), y) for x, y in (batch() for _ in range(batches))]
    return Workload("ResNet-8", model.to(dtype).eval(), data, layers, loss)


def _drawn(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw the weights anew, from a generator of their own."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05, generator=generator)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    return model


def _train(model: nn.Module, batch: Callable[[], Batch], steps: int, *, rate: float) -> float:
    """Train by Adam and return the last loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    criterion = TokenLoss()
    loss = torch.zeros(())
    for _ in range(steps):
        x, y = batch()
        optimizer.zero_grad()
        loss = criterion(model.train()(x), y)
        loss.backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = self.queries_keys_values(x).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(later, -1e9)
        return self.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads=max(1, width // 32))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))


class _Decoder(nn.Module):
    def __init__(self, blocks: int, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, activation: type[nn.Module]) -> None:
        super().__init__()
        stride = 1 if inside == outside else 2
        self.conv_1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv_2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm_1, self.norm_2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.activation = activation()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm_1(self.conv_1(x)))
        return self.activation(self.norm_2(self.conv_2(y)) + self.shortcut(x))


class _ResNet(nn.Module):
    def __init__(self, width: int, classes: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.activation = activation()
        self.stages = nn.Sequential(
            _Residual(width, width, activation),
            _Residual(width, 2 * width, activation),
            _Residual(2 * width, 4 * width, activation),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.activation(self.norm(self.first(x))))
        return self.head(x.mean((-1, -2)))
