"""The loss on held-out data while a network is tuned: at few steps, and of much data on a part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hawqkit import distributed
from hawqkit.models.batch import Data, predictions
from hawqkit.records import Floats, HeldOutLoss
from hawqkit.statistics import ratio
from hawqkit.store import Arrays
from hawqkit.tuning.losses import counted_logits

POINTS = 10  # of a curve, beside the one before the first step
MOST, TOKENS = 512, 65_536  # examples of one data set that are measured, and their tokens
_BATCH, _BATCH_TOKENS = 64, 1024  # of a forward pass
_KEY = "held-out"
_COLUMNS = ("step", "examples", "loss", "loss_stderr", "accuracy", "accuracy_stderr")


def watched_steps(steps: int) -> frozenset[int]:
    """Return the numbers of steps after which held-out data are measured, 0 and all among them.

    >>> sorted(watched_steps(4)), sorted(watched_steps(1000))[:3]
    ([0, 1, 2, 3, 4], [0, 100, 200])
    """
    return frozenset(round(part * steps / POINTS) for part in range(POINTS + 1))


def watched_rows(data: Data) -> list[int]:
    """Return the examples that are measured: all, or `MOST` of them evenly spread."""
    count = min(len(data), MOST, max(2, TOKENS // max(data.facts.length, 1)))
    return [place * len(data) // count for place in range(count)]


def batch_of(data: Mapping[str, Data]) -> int:
    """Return how many held-out examples go through a network together; logits stay small."""
    length = max(each.facts.length for each in data.values())
    return min(_BATCH, max(1, _BATCH_TOKENS // length))


class Watch:
    """Held-out losses of a network in training.

    Every process runs its share of the examples, and all know the result.

    Attributes:
        found: what was measured, in the order of steps.
    """

    def __init__(self, data: Mapping[str, Data], batch: int) -> None:
        """Watch some data.

        Args:
            data: name -> examples, or text.
            batch: of them that go through the network together.
        """
        self._data = {name: (each, watched_rows(each)) for name, each in data.items()}
        self._batch = batch
        self.found: list[HeldOutLoss] = []

    def __bool__(self) -> bool:
        """Whether there is something to watch."""
        return bool(self._data)

    @torch.no_grad()
    def measure(self, module: nn.Module, device: torch.device, step: int) -> None:
        """Measure a network as it is after so many steps."""
        for name, (data, rows) in self._data.items():
            sums = _sums(
                module, device, data, [rows[i : i + self._batch] for i in self._starts(rows)]
            )
            self.found.append(_evaluated(name, step, data, rows, sums[:, rows]))

    def to_arrays(self) -> Arrays:
        """Return what was measured, for a checkpoint."""
        return {
            self._key(name): np.array(
                [[_number(getattr(f, c)) for c in _COLUMNS] for f in self.found if f.text == name],
                dtype=np.float64,
            ).reshape(-1, len(_COLUMNS))
            for name in self._data
        }

    def restore(self, arrays: Arrays) -> None:
        """Take what a checkpoint knows of the same data."""
        rows = [
            (name, row)
            for name in self._data
            for row in arrays.get(self._key(name), np.zeros((0, len(_COLUMNS)))).tolist()
        ]
        made = [_from_row(name, row) for name, row in rows]
        places = {name: place for place, name in enumerate(self._data)}
        self.found = sorted(made, key=lambda f: (f.step, places[f.text]))

    def _key(self, name: str) -> str:
        return f"{_KEY}/{self._data[name][0].facts.hash}/{name}"

    def _starts(self, rows: Sequence[int]) -> range:
        return range(0, len(rows), self._batch)


def _sums(
    module: nn.Module, device: torch.device, data: Data, parts: Sequence[Sequence[int]]
) -> Floats:
    """Return (3, S): summed cross-entropy, right predictions and predictions of each example."""
    sums = torch.zeros(3, len(data), dtype=torch.float64, device=device)
    for part in distributed.processes().mine(parts):
        batch = data.micro_batch(part)
        logits, labels = counted_logits(predictions(module, batch, device), batch)
        place = batch.index[:, None].expand_as(batch.predicts)[batch.predicts].to(device)
        losses = cross_entropy(logits, labels, reduction="none").double()
        right = (logits.argmax(-1) == labels).double()
        sums.index_add_(1, place, torch.stack([losses, right, torch.ones_like(right)]))
    found: Floats = distributed.reduce_sum(sums).cpu().numpy()
    return found


def _evaluated(name: str, step: int, data: Data, rows: Sequence[int], sums: Floats) -> HeldOutLoss:
    """Return means over predictions with their jackknife errors, clustered by document."""
    documents = data.document.numpy().astype(np.int64)[list(rows)]
    apart = documents if len(np.unique(documents)) > 1 else np.arange(len(rows))
    loss, loss_stderr = ratio(sums[0], sums[2], apart)
    accuracy, accuracy_stderr = ratio(sums[1], sums[2], apart)
    numbers = (float(x) for x in (loss, loss_stderr, accuracy, accuracy_stderr))
    return _from_row(name, [step, len(rows), *numbers])


def _from_row(name: str, row: Sequence[float]) -> HeldOutLoss:
    step, examples, loss, loss_stderr, accuracy, accuracy_stderr = row
    return HeldOutLoss(
        text=name,
        step=int(step),
        examples=int(examples),
        loss=loss,
        loss_stderr=_known(loss_stderr),
        accuracy=accuracy,
        accuracy_stderr=_known(accuracy_stderr),
    )


def _known(stderr: float) -> float | None:
    """Return an error, None where a single example has none."""
    return stderr if math.isfinite(stderr) else None


def _number(value: float | None) -> float:
    return math.nan if value is None else value
