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

    The first position, where attention sinks sit, is always taken, and others at random. The first
    token's input is often a hundred times the others'; leaving it to chance would make one sequence
    in T/k decide the score. Weights keep every sum unbiased: 1 for the first position,
    (length - 1) / (k - 1) for the others. A draw depends on (seed, example, T) alone.

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
        k = min(self._count, length)
        keys = uniforms(self._index, length, self._seed)  # (B, T)
        lengths = torch.full((len(self._index), 1), length)
        if self._attention is not None and self._attention.shape[1] == length:
            keys = keys.masked_fill(~self._attention, 2.0)
            lengths = self._attention.sum(1, keepdim=True)  # (B, 1)
        keys[:, 0] = -1.0
        index = keys.argsort(dim=1, stable=True)[:, :k]  # (B, k)
        taken = lengths.clamp(max=k)
        weight = ((lengths - 1) / (taken - 1).clamp(min=1)).expand(-1, k).clone()
        weight[:, 0] = 1.0
        weight = weight * (torch.arange(k) < taken)
        return Positions(index.to(self._device), weight.to(self._device))
