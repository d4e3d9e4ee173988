"""What every kind of data looks like to those who measure: batches of examples with predictions.

A language model predicts at every position, a classifier once an example; both give logits
(b, t, V), with t = 1 for the classifier.

Letters in shapes: b examples of a batch, t predictions of an example, T input positions, V classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hawqkit.errors import DataError, Unsupported
from hawqkit.records import DataFacts

FIRST = "(first)"  # an argument's name that stands for the first one of a model's forward


class Batch(ABC):
    """Some examples: what the model is given, and which of its predictions count.

    Attributes:
        index: (b,) global indices of the examples.
        attention: (b, T) bool, True at real input positions; None where all inputs are whole.
    """

    __slots__ = ()

    index: Tensor
    attention: Tensor | None

    @abstractmethod
    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the model's forward by name, on its device."""

    @property
    @abstractmethod
    def predicts(self) -> Tensor:
        """(b, t) bool, whether the prediction that is made at an output position counts."""

    @property
    @abstractmethod
    def targets(self) -> Tensor:
        """(b, t) int64, the true class of each prediction; arbitrary where it does not count."""


class Data(ABC):
    """Examples that can be cut into batches; those that only predict come last.

    Attributes:
        document: (S,) int64, the cluster of an example: examples of one are not independent.
        withheld: (S,) bool, True where the example is kept from choosing.
        facts: where it came from and how much there is.
    """

    __slots__ = ()

    document: Tensor
    withheld: Tensor
    facts: DataFacts

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def micro_batch(self, index: Sequence[int]) -> Batch:
        """Return some examples."""

    def micro_batches(self, size: int) -> Iterator[Batch]:
        """Yield consecutive examples, `size` at a time."""
        for start in range(0, len(self), size):
            yield self.micro_batch(range(start, min(start + size, len(self))))


def run_model(module: nn.Module, batch: Batch, device: torch.device) -> Any:
    """Run a model on a batch and return whatever it returns."""
    arguments = batch.inputs(device)
    first = [arguments.pop(FIRST)] if FIRST in arguments else []
    return module(*first, **arguments)


def predictions(module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Run a model and return its logits (b, t, V).

    Args:
        module: returns a tensor or an object with `.logits`, of shape (b, V) or (b, t, V).
        batch: what it is given.
        device: that it lies on.

    Raises:
        Unsupported: it returns something else.
    """
    out = run_model(module, batch, device)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3):
        came = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise Unsupported(
            f"the model returns {came}; predictions are logits of shape (examples, classes) or "
            "(examples, positions, classes), by themselves or as `.logits`."
        )
    if logits.ndim == 2:
        logits = logits[:, None]
    if logits.shape[:2] != batch.predicts.shape:
        raise Unsupported(
            f"the model makes predictions of shape {tuple(logits.shape[:2])} for a batch that "
            f"counts {tuple(batch.predicts.shape)} (examples, positions) of them."
        )
    return logits


def refuse_labels(targets: Tensor, predicts: Tensor, classes: int) -> None:
    """Refuse labels that no logit stands for.

    Raises:
        DataError: a label that counts is below 0, or `classes` or more.
    """
    wrong = predicts & ((targets < 0) | (targets >= classes))
    if bool(wrong.any()):
        some = sorted(set(targets[wrong].tolist()))[:5]
        raise DataError(
            f"{int(wrong.sum())} labels lie outside the {classes} classes that the model tells "
            f"apart (0 to {classes - 1}), for instance {', '.join(map(str, some))}; check the "
            "labels, or load the model with as many classes as the data have."
        )
