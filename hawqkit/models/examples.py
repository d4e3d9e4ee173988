"""Labelled examples of a classifier: images, texts, or arrays of any kind.

Letters in shapes: S examples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.errors import DataError, InputError
from hawqkit.models.batch import FIRST, Batch, Data
from hawqkit.records import DataFacts

ATTENTION = "attention_mask"  # the argument that says which positions of a text are real


@dataclass(frozen=True, slots=True, eq=False)
class Examples(Data):
    """Examples with one label each; those that only predict come last.

    Attributes:
        inputs: argument of the model's forward -> (S, ...) tensor.
        labels: (S,) int64.
        document: (S,) int64, every example its own cluster unless told otherwise.
        withheld: (S,) bool, True where the example is kept from choosing.
        facts: where it came from and how much there is.
        names: of the classes, in their order; empty where they have none.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    document: Tensor
    withheld: Tensor
    facts: DataFacts
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return the number of examples."""
        return int(self.labels.shape[0])

    def micro_batch(self, index: Sequence[int]) -> ExampleBatch:
        """Return some examples; texts are cut to the longest of them."""
        rows = torch.tensor(list(index), dtype=torch.int64)
        tensors = {name: value[rows] for name, value in self.inputs.items()}
        mask = tensors.get(ATTENTION)
        if mask is not None:
            length = int(mask.sum(1).max())
            tensors = {
                name: value[:, :length] if value.shape[1:2] == mask.shape[1:2] else value
                for name, value in tensors.items()
            }
        real = None if mask is None else tensors[ATTENTION].bool()
        return ExampleBatch(rows, tensors, self.labels[rows], real)


@dataclass(frozen=True, slots=True, eq=False)
class ExampleBatch(Batch):
    """Some examples of an `Examples`; b of them.

    Attributes:
        index: (b,) global indices.
        tensors: argument name -> (b, ...).
        labels: (b,) int64.
        attention: (b, T) bool, the positions of a text that are real; None for other inputs.
    """

    index: Tensor
    tensors: dict[str, Tensor]
    labels: Tensor
    attention: Tensor | None = None

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the model's forward by name, on its device."""
        return {name: value.to(device) for name, value in self.tensors.items()}

    @property
    def predicts(self) -> Tensor:
        """(b, 1), one prediction an example, which counts."""
        return torch.ones(len(self.labels), 1, dtype=torch.bool)

    @property
    def targets(self) -> Tensor:
        """(b, 1), the labels."""
        return self.labels[:, None]


def make_examples(
    inputs: Mapping[str, Any] | Any,
    labels: Any,
    *,
    argument: str = FIRST,
    classes: int | None = None,
    names: Sequence[str] = (),
    withheld: int = 0,
    document: Any = None,
    source: str = "arrays",
    kind: str = "arrays",
    seed: int = 0,
) -> Examples:
    """Wrap arrays as labelled examples, and compute their facts.

    Args:
        inputs: one array (S, ...) for a model of one argument, or argument name -> array. Floating
            arrays become float32 unless they are float64, whole numbers int64.
        labels: (S,) whole numbers, the classes.
        argument: name of the one argument; by default the first of the model's forward.
        classes: number of classes; by default the largest label and one.
        names: of the classes.
        withheld: the last so many examples only predict, they do not choose.
        document: (S,) clusters of examples that are not independent (frames of one film); every
            example its own if None.
        source: what records call the data.
        kind: what the examples are, for people.
        seed: what records say about the choice of examples.

    Raises:
        InputError: shapes do not belong together, or `withheld` leaves nothing to choose with.
        DataError: labels are no whole numbers or lie outside the classes, or inputs hold NaN.

    >>> make_examples(np.zeros((4, 3)), [0, 1, 1, 0]).facts.counted
    4
    """
    given = inputs if isinstance(inputs, Mapping) else {argument: inputs}
    tensors = {name: _as_input(name, value) for name, value in given.items()}
    classed = _as_labels(labels)
    count = len(classed)
    for name, value in tensors.items():
        if value.ndim == 0 or len(value) != count:
            raise InputError(
                f"examples: {name!r} has shape {tuple(value.shape)} beside {count} labels; its "
                "first dimension must be the examples."
            )
    if not 0 <= withheld < max(count, 1):
        raise InputError(
            f"examples: {withheld} of {count} were to be withheld; at least one must choose."
        )
    classes = int(classed.max()) + 1 if classes is None else classes
    wrong = (classed < 0) | (classed >= classes)
    if bool(wrong.any()):
        some = sorted(set(classed[wrong].tolist()))[:5]
        raise DataError(
            f"{int(wrong.sum())} labels of {source} lie outside the {classes} classes (0 to "
            f"{classes - 1}), for instance {', '.join(map(str, some))}."
        )
    clusters = torch.arange(count) if document is None else torch.as_tensor(document).long()
    kept = torch.arange(count) >= count - withheld
    attention = tensors.get(ATTENTION)
    facts = DataFacts(
        source=source,
        hash=_hash([*tensors.values(), classed, clusters, kept]),
        sequences=count,
        length=int(attention.sum(1).max()) if attention is not None else 1,
        tokens=int(attention.sum()) if attention is not None else count,
        counted=count,
        documents=len(set(clusters.tolist())),
        seed=seed,
        kind=kind,
        classes=classes,
    )
    return Examples(tensors, classed, clusters, kept, facts, tuple(names))


def _as_input(name: str, value: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value)
    if not tensor.is_floating_point():
        return tensor.to(torch.int64)
    if not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).flatten(1).any(1).sum()) if tensor.ndim > 1 else 1
        raise DataError(f"examples: {name!r} holds NaN or infinity in {bad} examples.")
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _as_labels(labels: Any) -> Tensor:
    tensor = torch.as_tensor(np.asarray(labels) if not isinstance(labels, Tensor) else labels)
    if tensor.ndim != 1 or not len(tensor):
        raise InputError(
            f"examples: labels have shape {tuple(tensor.shape)}; they must be one whole number for "
            "each example."
        )
    whole = tensor.to(torch.int64)
    if not torch.equal(whole.to(tensor.dtype), tensor):
        raise DataError("examples: labels are not whole numbers; they must be classes from 0 on.")
    return whole


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
