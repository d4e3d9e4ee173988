"""Which examples a step sees: a function of seed and step alone, so a resume needs no state."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch


class Order:
    """Examples one epoch after another, each epoch in an order of its own; batches straddle epochs.

    Every example is seen once before any is seen again, whatever the size of a batch.

    >>> order = Order([10, 11, 12], batch=2, seed=0)
    >>> sorted(order(0) + order(1)[:1]), sorted(order(1)[1:] + order(2))
    ([10, 11, 12], [10, 11, 12])

    Args:
        rows: the examples that train.
        batch: examples of a step.
        seed: of all epochs.
    """

    def __init__(self, rows: Sequence[int], *, batch: int, seed: int) -> None:
        self.rows, self.batch, self._seed = list(rows), batch, seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled)

    def __call__(self, step: int) -> list[int]:
        """Return the examples of a step."""
        count = len(self.rows)
        places = range(step * self.batch, (step + 1) * self.batch)
        return [self._epoch(place // count)[place % count] for place in places]

    def ends_epoch(self, step: int) -> bool:
        """Whether the last example of an epoch is in a step."""
        count = len(self.rows)
        return (step + 1) * self.batch // count > step * self.batch // count

    def _shuffled(self, epoch: int) -> list[int]:
        # Seeds of 64 bits, far apart for neighboring seeds and epochs (the odd constant of
        # splitmix64), so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        mixed = (self._seed * 0x9E3779B97F4A7C15 + epoch) & 0x7FFFFFFFFFFFFFFF
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(len(self.rows), generator=generator).tolist()
        return [self.rows[place] for place in order]
