"""Which positions of each example the token score looks at.

Letters: B examples, T positions of a layer's output (tokens of a text, pixels of an image, 1 where
a layer sees an example once), k sampled positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.sensitivity.labels import uniforms

POSITION_STREAM = 0x5EED  # keeps the draws of positions apart from those of labels

PIXELS = 64  # for each sampled one, at least


@dataclass(frozen=True, slots=True)
class Positions:
    """Sampled positions of the token score.

    Attributes:
        index: (B, k) positions.
        weight: (B, k) how many positions each of them stands for; 0 fills up short sequences.
    """

    index: Tensor
    weight: Tensor


class PositionSampler:
    """Draws positions of one batch for layers of any number of positions.

    Of a text the first position, where attention sinks sit, is always taken, and others at random.
    The first token's input is often a hundred times the others'; leaving it to chance would make
    one sequence in T/k decide the score. Weights keep every sum unbiased: 1 for the first position,
    (length - 1) / (k - 1) for the others.

    Pixels are all alike: one at random from each of k equal stretches, with weight T/k, but no more
    than one in 64, so that the score stays cheap beside the gradients where an image has few. A
    stretch that ends inside a pixel takes it with the part that it holds, so every pixel is taken
    k/T times in the mean.

    A draw depends on (seed, example, T) alone.

    Args:
        index: global indices of the B examples.
        attention: (B, T) real positions, for layers with just so many; all others are whole.
        count: k, at most.
        seed: of the probe.
        device: where the result is wanted.
    """

    def __init__(
        self,
        index: Sequence[int],
        attention: Tensor | None,
        count: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self._index, self._attention = list(index), attention
        self._count, self._seed, self._device = count, seed ^ POSITION_STREAM, device
        self._made: dict[int, Positions] = {}

    def at(self, length: int) -> Positions:
        """Return the sampled positions for layers of `length` positions."""
        if length not in self._made:
            self._made[length] = self._draw(length)
        return self._made[length]

    def _draw(self, length: int) -> Positions:
        if self._attention is None or self._attention.shape[1] != length:
            k = min(self._count, -(-length // PIXELS))
            within = uniforms(self._index, k, self._seed + length)  # (B, k)
            index = ((torch.arange(k) + within) * (length / k)).long().clamp_(max=length - 1)
            weight = torch.full(index.shape, length / k)
            return Positions(index.to(self._device), weight.to(self._device))
        keys = uniforms(self._index, length, self._seed)  # (B, T)
        k = min(self._count, length)
        keys = keys.masked_fill(~self._attention, 2.0)
        keys[:, 0] = -1.0
        index = keys.argsort(dim=1, stable=True)[:, :k]  # (B, k)
        lengths = self._attention.sum(1, keepdim=True)  # (B, 1)
        taken = lengths.clamp(max=k)
        weight = ((lengths - 1) / (taken - 1).clamp(min=1)).expand(-1, k).clone()
        weight[:, 0] = 1.0
        weight = weight * (torch.arange(k) < taken)
        return Positions(index.to(self._device), weight.to(self._device))
