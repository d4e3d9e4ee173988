"""Token sequences with their masks, and how they are cut into micro-batches.

Letters in shapes: S sequences, T tokens of the longest one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.records import DataFacts


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Calibration or held-out text as tokens; sequences that only predict come last.

    Attributes:
        tokens: (S, T) int64, padded on the right.
        attention: (S, T) bool, True for real tokens.
        counted: (S, T) bool, True where the prediction OF that token, made one position earlier,
            enters the mean; column 0 is False.
        document: (S,) int64, the document that a sequence is from (most of it, if several).
        withheld: (S,) bool, True where the sequence is kept from choosing.
        facts: where it came from and how much there is.
    """

    tokens: Tensor
    attention: Tensor
    counted: Tensor
    document: Tensor
    withheld: Tensor
    facts: DataFacts

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """Yield consecutive sequences, `size` at a time, without padding that all of them have."""
        for start in range(0, len(self), size):
            yield self.micro_batch(range(start, min(start + size, len(self))))

    def micro_batch(self, index: Sequence[int]) -> MicroBatch:
        """Return some sequences, cut to the longest of them."""
        rows = torch.tensor(list(index), dtype=torch.int64)
        attention = self.attention[rows]
        length = int(attention.sum(1).max())
        return MicroBatch(
            index=rows,
            tokens=self.tokens[rows, :length],
            attention=attention[:, :length],
            counted=self.counted[rows, :length],
        )


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """Some sequences of a `Sequences`; b of them, t tokens long.

    Attributes:
        index: (b,) global indices of the sequences.
        tokens: (b, t) int64.
        attention: (b, t) bool.
        counted: (b, t) bool.
    """

    index: Tensor
    tokens: Tensor
    attention: Tensor
    counted: Tensor


def make_sequences(
    tokens: Tensor,
    attention: Tensor,
    counted: Tensor,
    *,
    document: Tensor | None = None,
    withheld: Tensor | None = None,
    source: str = "tensors",
    seed: int = 0,
) -> Sequences:
    """Wrap ready-made tensors, and compute their facts.

    Args:
        tokens: (S, T) int64, padded on the right.
        attention: (S, T) bool.
        counted: (S, T) bool; predictions of padding and of first tokens are dropped.
        document: (S,) int64; every sequence its own document if None.
        withheld: (S,) bool; none if None.
        source: what records call the data.
        seed: what records say about the choice of windows.
    """
    count = tokens.shape[0]
    document = torch.arange(count) if document is None else document
    withheld = torch.zeros(count, dtype=torch.bool) if withheld is None else withheld
    attention = attention.bool()
    counted = counted.bool() & attention
    counted[:, 0] = False
    facts = DataFacts(
        source=source,
        hash=_hash(tokens, attention, counted, document, withheld),
        sequences=count,
        length=int(attention.sum(1).max()) if count else 0,
        tokens=int(attention.sum()),
        counted=int(counted.sum()),
        documents=len(set(document.tolist())),
        seed=seed,
    )
    return Sequences(tokens.long(), attention, counted, document.long(), withheld.bool(), facts)


def _hash(tokens: Tensor, *masks: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(tokens.shape)).encode())
    for tensor in (tokens, *masks):
        digest.update(tensor.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
