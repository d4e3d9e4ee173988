"""The batches that an objective is a sum over: the same ones in every product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hawqkit.errors import DataError, InputError
from hawqkit.models.batch import Data


class Batches:
    """Re-iterable batches that are checked to be the same ones in every pass.

    Args:
        source: any re-iterable of batches (a list, a `DataLoader`), or `Data`, of which examples
            are taken one at a time, without those that are withheld. For more of them a batch give
            `list(sequences.micro_batches(4))`.
        ordered: whether their order must be the same in every pass too.

    Raises:
        InputError: it can be walked through once only, or not at all.
    """

    def __init__(self, source: Iterable[Any], *, ordered: bool = False) -> None:
        if isinstance(source, Data):
            chosen = torch.nonzero(~source.withheld)[:, 0].tolist()
            source = [source.micro_batch([row]) for row in chosen]
        if not isinstance(source, Iterable) or isinstance(source, (Tensor, Mapping, str)):
            raise InputError(
                f"batches: got {type(source).__name__}; give a list or another collection of "
                "batches, each a pair (inputs, targets) or a dictionary."
            )
        if iter(source) is source:
            raise InputError(
                f"batches: got {type(source).__name__}, which can be walked through once only, but "
                "every product with an operator walks through all batches; give a list of them."
            )
        self._source, self._ordered = source, ordered
        self._seen: tuple[int, float] | None = None

    def __iter__(self) -> Iterator[tuple[int, int, Any]]:
        """Yield (number, index of the first example, batch), and check the whole at the end.

        Raises:
            DataError: there is no batch, or they are not those of the pass before.
        """
        number, examples, digest = 0, 0, 0.0
        for batch in self._source:
            tensors = list(_tensors(batch))
            yield number, examples, batch
            number += 1
            examples += tensors[0].shape[0] if tensors and tensors[0].ndim else 1
            weight = number if self._ordered else 1
            digest += weight * sum(float(t.detach().sum(dtype=torch.float64)) for t in tensors)
        if number == 0:
            raise DataError("batches: there is none, so there is no loss to differentiate.")
        self._compare(number, digest)

    def first(self) -> Any:
        """Return the first batch.

        Raises:
            DataError: there is none.
        """
        for batch in self._source:
            return batch
        raise DataError("batches: there is none, so there is no loss to differentiate.")

    def _compare(self, number: int, digest: float) -> None:
        if self._seen is None:
            self._seen = (number, digest)
            return
        before, value = self._seen
        # The order may differ from pass to pass, and with it the rounding of this sum.
        same = abs(digest - value) <= 1e-6 * max(abs(digest), abs(value)) or digest != digest
        if number != before or not same:
            raise DataError(
                f"batches: the {number} of this pass are not the {before} of the first pass, so "
                "products would belong to different matrices. A loader that augments at random, or "
                "that shuffles and drops the last batch, does that"
                + (", and here any that shuffles, since labels are drawn by place" * self._ordered)
                + "; give a list of its batches."
            )


def to_device(item: Any, device: torch.device) -> Any:
    """Return a batch with its tensors on a device; tuples, lists, mappings, dataclasses inside."""
    if isinstance(item, Tensor):
        return item.to(device)
    if isinstance(item, Mapping):
        return {key: to_device(value, device) for key, value in item.items()}
    if isinstance(item, (list, tuple)) and not hasattr(item, "_fields"):
        return type(item)(to_device(value, device) for value in item)
    if is_dataclass(item) and not isinstance(item, type):
        return replace(
            item, **{f.name: to_device(getattr(item, f.name), device) for f in fields(item)}
        )
    return item


def _tensors(item: Any) -> Iterator[Tensor]:
    """Yield the tensors of a batch in order."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)
    elif is_dataclass(item) and not isinstance(item, type):
        for f in fields(item):
            yield from _tensors(getattr(item, f.name))
