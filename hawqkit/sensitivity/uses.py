"""One use of a weight in a pass: what it adds to each sequence's gradient and to the token score.

Letters: B sequences, T positions, k sampled positions, F formats, R rows of the weight that are
handled at once, C columns. The weight is (rows, columns); a linear layer's rows are its outputs, an
embedding's rows are the vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.sensitivity.positions import Positions


class Use(ABC):
    """Inputs and output gradients of one call of a layer.

    Attributes:
        gradients: (B, ...) at the layer's output.
        rows_together: rows that see the same inputs; rows are asked for in slices that lie within
            one such group or hold whole ones. 0 where all rows do.
    """

    gradients: Tensor
    rows_together: int = 0

    @property
    @abstractmethod
    def length(self) -> int:
        """Positions at which the layer acts on an example."""

    def arrange(self, errors: Tensor) -> Tensor:
        """Return errors (F, R, C) with their columns in the order that this use works in."""
        return errors

    @abstractmethod
    def rows(self, total: int) -> Tensor | None:
        """Return the rows of the weight that this use can touch, None for all of them."""

    @abstractmethod
    def gradient(self, rows: Tensor | slice, some: slice) -> Tensor:
        """Return the gradients of those rows for b examples, (b, R, C), columns as `arrange`'s."""

    @abstractmethod
    def norms(self, positions: Positions) -> Tensor:
        """Return |d_t|^2 |a_t|^2 at the sampled positions, (B, k)."""

    @abstractmethod
    def responses(
        self, rows: Tensor | slice, errors: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Return what those rows add to the token scores, from errors (F, R, C).

        Returns:
            sum over outputs of (d_to (dW a_t)_o)^2 and d_t . dW a_t, each (B, k, F).
        """


@dataclass(frozen=True, slots=True, eq=False)
class LinearUse(Use):
    """A matrix product: inputs (B, T, C), output gradients (B, T, rows)."""

    inputs: Tensor
    gradients: Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.gradients.shape[1]

    def rows(self, total: int) -> Tensor | None:
        """Every row is touched."""
        return None

    def gradient(self, rows: Tensor | slice, some: slice) -> Tensor:
        """Return sum_t d_t a_t', (b, R, C)."""
        d = wide(self.gradients[some, :, rows])
        return torch.bmm(d.transpose(1, 2), wide(self.inputs[some]))

    def norms(self, positions: Positions) -> Tensor:
        """Return |d_t|^2 |a_t|^2, (B, k)."""
        d, a = _take(self.gradients, positions), _take(self.inputs, positions)
        return d.square().sum(-1) * a.square().sum(-1)

    def responses(
        self, rows: Tensor | slice, errors: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """One product of (F R, C) with (C, B k), then a sum over rows."""
        formats, count, columns = errors.shape
        d, a = _take(self.gradients[..., rows], positions), _take(self.inputs, positions)
        # In this order: BLAS is up to a third faster with the long side first.
        y = errors.reshape(formats * count, columns) @ a.flatten(0, 1).T
        y = y.view(formats, count, *positions.index.shape).mul_(d.permute(2, 0, 1))
        return y.square().sum(1).permute(1, 2, 0), y.sum(1).permute(1, 2, 0)


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingUse(Use):
    """A table lookup: token ids (B, T), output gradients (B, T, C); a_t is one-hot, |a_t| = 1."""

    ids: Tensor
    gradients: Tensor

    @property
    def length(self) -> int:
        """Tokens."""
        return self.gradients.shape[1]

    def rows(self, total: int) -> Tensor | None:
        """Only the rows of tokens that occur are touched."""
        touched: Tensor = torch.unique(self.ids)
        return touched

    def gradient(self, rows: Tensor | slice, some: slice) -> Tensor:
        """Scatter the output gradients over token ids, (b, R, C)."""
        place, inside = (part[some] for part in self._places(rows))
        d = wide(self.gradients[some]) * inside[..., None]
        count = count_of(rows)
        out = d.new_zeros(len(d), count, d.shape[-1])
        return out.scatter_add_(1, place[..., None].expand_as(d), d)

    def norms(self, positions: Positions) -> Tensor:
        """Return |d_t|^2, (B, k)."""
        return _take(self.gradients, positions).square().sum(-1)

    def responses(
        self, rows: Tensor | slice, errors: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Look up the errors of the sampled tokens, where their rows are among `rows`."""
        place, inside = self._places(rows)
        place, inside = place.gather(1, positions.index), inside.gather(1, positions.index)
        d = _take(self.gradients, positions) * inside[..., None]  # (B, k, C)
        y = errors[:, place] * d  # (F, B, k, C)
        return y.square().sum(-1).permute(1, 2, 0), y.sum(-1).permute(1, 2, 0)

    def _places(self, rows: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return where each token's row stands within `rows`, and whether it is there at all."""
        if isinstance(rows, slice):
            inside = (self.ids >= rows.start) & (self.ids < rows.stop)
            return (self.ids - rows.start) * inside, inside
        place = torch.searchsorted(rows, self.ids.contiguous()).clamp_(max=len(rows) - 1)
        inside = rows[place] == self.ids
        return place * inside, inside


def _take(values: Tensor, positions: Positions) -> Tensor:
    index = positions.index[..., None].expand(-1, -1, values.shape[-1])
    return wide(values.gather(1, index))


def wide(values: Tensor) -> Tensor:
    """Return a tensor in float32, or float64 if it is that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def count_of(rows: Tensor | slice) -> int:
    """Return how many rows are asked for."""
    return len(rows) if isinstance(rows, Tensor) else int(rows.stop - rows.start)
