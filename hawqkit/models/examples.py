"""Examples with labels or other targets: images, texts, or arrays of any kind.

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
    """Examples with one label each, or with targets; those that only predict come last.

    Attributes:
        inputs: argument of the model's forward -> (S, ...) tensor.
        labels: (S,) int64, or the targets (S, ...) where `facts.classes` is 0.
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
        """Return some examples; labelled texts are cut to the longest of them.

        Targets may have an axis of positions, so beside them texts keep their length.
        """
        rows = torch.tensor(list(index), dtype=torch.int64)
        tensors = {name: value[rows] for name, value in self.inputs.items()}
        mask, classed = tensors.get(ATTENTION), self.facts.classes > 0
        if mask is not None and classed:
            length = int(mask.sum(1).max())
            tensors = {
                name: value[:, :length] if value.shape[1:2] == mask.shape[1:2] else value
                for name, value in tensors.items()
            }
        real = None if mask is None else tensors[ATTENTION].bool()
        return ExampleBatch(rows, tensors, self.labels[rows], real, classed)


@dataclass(frozen=True, slots=True, eq=False)
class ExampleBatch(Batch):
    """Some examples of an `Examples`; b of them.

    Attributes:
        index: (b,) global indices.
        tensors: argument name -> (b, ...).
        labels: (b,) int64, or the targets (b, ...).
        attention: (b, T) bool, the positions of a text that are real; None for other inputs.
        classed: whether labels are classes, and so every example makes one prediction.
    """

    index: Tensor
    tensors: dict[str, Tensor]
    labels: Tensor
    attention: Tensor | None = None
    classed: bool = True

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of the model's forward by name, on its device."""
        return {name: value.to(device) for name, value in self.tensors.items()}

    @property
    def predicts(self) -> Tensor:
        """(b, 1), one prediction an example, which counts.

        Raises:
            InputError: the examples have targets and no classes.
        """
        self._refuse_targets()
        return torch.ones(len(self.labels), 1, dtype=torch.bool)

    @property
    def targets(self) -> Tensor:
        """(b, 1), the labels.

        Raises:
            InputError: the examples have targets and no classes.
        """
        self._refuse_targets()
        return self.labels[:, None]

    def _refuse_targets(self) -> None:
        if not self.classed:
            raise InputError(
                f"these examples have targets of shape {tuple(self.labels.shape[1:])} and no "
                "classes, so the cross-entropy of one label each is not their loss. Give the loss "
                "where it can be given: probe(..., objective=squared_error()) or another "
                "Objective, measure_loss, hessian, layer_traces. What knows classifiers and "
                "language models alone (validate, tune) cannot take them."
            )


def make_examples(
    inputs: Mapping[str, Any] | Any,
    labels: Any = None,
    *,
    targets: Any = None,
    argument: str = FIRST,
    classes: int | None = None,
    names: Sequence[str] = (),
    withheld: int = 0,
    document: Any = None,
    source: str = "arrays",
    kind: str = "arrays",
    seed: int = 0,
) -> Examples:
    """Wrap arrays as examples with labels or with targets, and compute their facts.

    Targets are for losses other than a classifier's: values of a regression, a clean picture for
    each noisy one, a class for every pixel. `probe(..., objective=...)` says what they mean; the
    objective finds them in `batch.labels`, in the shape (b, ...) that they have here.

    Args:
        inputs: one array (S, ...) for a model of one argument, or argument name -> array. Floating
            arrays become float32 unless they are float64, whole numbers int64.
        labels: (S,) whole numbers, the classes.
        targets: instead of labels, one array (S, ...) of any shape, its dtype as that of inputs.
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
        InputError: shapes do not belong together, `withheld` leaves nothing to choose with, or not
            just one of labels and targets came, or classes beside targets.
        DataError: labels are no whole numbers or lie outside the classes, or inputs hold NaN.

    >>> make_examples(np.zeros((4, 3)), [0, 1, 1, 0]).facts.counted
    4
    >>> targets = np.ones((4, 2), dtype=np.float32)
    >>> make_examples(np.zeros((4, 3)), targets=targets).micro_batch([0]).labels
    tensor([[1., 1.]])
    """
    if (labels is None) == (targets is None):
        raise InputError(
            f"examples: {'neither labels nor targets' if labels is None else 'labels and targets'} "
            "came; give labels (one class an example) or targets (any array), not both."
        )
    given = inputs if isinstance(inputs, Mapping) else {argument: inputs}
    tensors = {name: _as_input(name, value) for name, value in given.items()}
    what = "labels" if targets is None else "targets"
    known = _as_labels(labels) if targets is None else _as_targets(targets)
    count = len(known)
    for name, value in tensors.items():
        if value.ndim == 0 or len(value) != count:
            raise InputError(
                f"examples: {name!r} has shape {tuple(value.shape)} beside {count} {what}; its "
                "first dimension must be the examples."
            )
    if not 0 <= withheld < max(count, 1):
        raise InputError(
            f"examples: {withheld} of {count} were to be withheld; at least one must choose."
        )
    if targets is None:
        classes = _count_classes(known, classes, source)
    elif classes is not None or names:
        raise InputError("examples: classes and names are of labels; with targets leave them out.")
    clusters = torch.arange(count) if document is None else torch.as_tensor(document).long()
    kept = torch.arange(count) >= count - withheld
    attention = tensors.get(ATTENTION)
    facts = DataFacts(
        source=source,
        hash=_hash([*tensors.values(), known, clusters, kept]),
        sequences=count,
        length=int(attention.sum(1).max()) if attention is not None else 1,
        tokens=int(attention.sum()) if attention is not None else count,
        counted=count,
        documents=len(set(clusters.tolist())),
        seed=seed,
        kind=kind,
        classes=classes or 0,
    )
    return Examples(tensors, known, clusters, kept, facts, tuple(names))


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


def _as_targets(targets: Any) -> Tensor:
    tensor = _as_input("targets", targets)
    if tensor.ndim == 0 or not len(tensor):
        raise InputError(
            f"examples: targets have shape {tuple(tensor.shape)}; their first dimension must be "
            "the examples."
        )
    return tensor


def _count_classes(labels: Tensor, classes: int | None, source: str) -> int:
    """Return the number of classes, and refuse labels outside of them."""
    classes = int(labels.max()) + 1 if classes is None else classes
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        some = sorted(set(labels[wrong].tolist()))[:5]
        raise DataError(
            f"{int(wrong.sum())} labels of {source} lie outside the {classes} classes (0 to "
            f"{classes - 1}), for instance {', '.join(map(str, some))}."
        )
    return classes


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
