"""Columns of the results: formats that share a weight error, or the way inputs are rounded.

Of the F formats of a layer W have different weights and A round inputs to different widths. Errors
are made for W, gradients with rounded inputs for A, and only the sums for F.

Letters: B sequences, b some of them, R rows of a weight at once, C its columns, k sampled
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.formats import Format, activation_bits_of, parse_format
from hawqkit.sensitivity.input_terms import Call, InputSums
from hawqkit.sensitivity.positions import Positions, PositionSampler
from hawqkit.sensitivity.uses import Use


@dataclass(frozen=True, slots=True)
class Columns:
    """Formats whose inputs are rounded alike.

    Attributes:
        width: place of the width among the A; None where inputs stay as they are.
        errors: place of each format's weight among the W.
        formats: column of each format among the F.
    """

    width: int | None
    errors: tuple[int, ...]
    formats: tuple[int, ...]


def weight_formats(names: Sequence[str]) -> list[Format]:
    """Return the W formats of weights that formats stand for, each once, without `none`.

    >>> [f.name for f in weight_formats(["w4a8", "int4-channel", "none", "w4a4", "int2-g32-a8"])]
    ['int4-channel', 'int2-g32']
    """
    found = (parse_format(n).weights for n in names)
    return list(dict.fromkeys(f for f in found if f.quantizes))


def plan_columns(names: Sequence[str], made: Sequence[Format]) -> tuple[Columns, ...]:
    """Return the columns of every width that formats round inputs to, untouched inputs first.

    >>> plan_columns(["w4a8", "w4a4", "int4-channel"], weight_formats(["w4a8"]))[1]
    Columns(width=0, errors=(0,), formats=(0,))

    Args:
        names: F formats; those whose weights are not among `made` are in no group.
        made: formats of weights whose errors are made, W.
    """
    place = {f.name: i for i, f in enumerate(made)}
    widths: tuple[int | None, ...] = (None, *activation_bits_of(names))
    groups = []
    for number, bits in enumerate(widths):
        members = [
            (place[form.weights.name], column)
            for column, form in enumerate(map(parse_format, names))
            if form.activation_bits == bits and form.weights.name in place
        ]
        groups.append(
            Columns(
                number - 1 if number else None,
                tuple(error for error, _ in members),
                tuple(column for _, column in members),
            )
        )
    return tuple(g for g in groups if g.formats or g.width is None)


class Tally:
    """The sums of a layer's formats whose inputs are rounded alike.

    Args:
        columns: which formats.
        calls: every use of the weight in this pass.
        sampler: of the token score's positions; None leaves that score out.
        like: dtype and device of the sums.
    """

    def __init__(
        self,
        columns: Columns,
        calls: Sequence[Call],
        sampler: PositionSampler | None,
        like: Tensor,
    ) -> None:
        self.columns = columns
        self.uses = [_rounded(call, columns.width) for call in calls]
        self._calls = calls
        count, batch = len(columns.formats), len(self.uses[0].gradients)
        self._at: list[Positions] = [
            sampler.at(use.length) for use in self.uses if sampler is not None and count
        ]
        self._directional = like.new_zeros(batch, count)
        self._squares = [like.new_zeros(*at.index.shape, count) for at in self._at]
        self._sums = [like.new_zeros(*at.index.shape, count) for at in self._at]

    @property
    def needs_gradient(self) -> bool:
        """Whether gradients with inputs of its own are wanted."""
        return self.columns.width is not None

    def add(self, made: Tensor, flat: Tensor, some: slice) -> None:
        """Add g . dW of some rows of the weight, for the examples `some`.

        Args:
            made: (W, R, C) errors.
            flat: (b, R C) gradients.
            some: b of the examples.
        """
        if self.columns.formats:
            # In this order: BLAS takes twice as long for a few rows times many columns.
            self._directional[some] += (self._own(made).flatten(1) @ flat.T).T

    def respond(self, made: Tensor, rows: Tensor | slice) -> None:
        """Add what some rows of the weight do at the sampled positions.

        Args:
            made: (W, R, C) errors.
            rows: the R rows.
        """
        each = zip(self.uses, self._at, self._squares, self._sums, strict=False)
        for use, at, squares, sums in each:
            more_squares, more_sums = use.responses(rows, self._own(made), at)
            squares += more_squares
            sums += more_sums

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return directional, token and token_summed, (B, formats) each."""
        token, summed = torch.zeros_like(self._directional), torch.zeros_like(self._directional)
        for at, squares, sums in zip(self._at, self._squares, self._sums, strict=True):
            w = at.weight.to(token)[..., None]  # (B, k, 1)
            token = token + (squares * w).sum(1)
            summed = summed + (sums.square() * w).sum(1)
        directional = self._directional
        inputs = input_sums(self._calls)
        if inputs is not None and self.columns.width is not None:
            directional = directional + inputs.linear[:, self.columns.width, None]
        return directional, token, summed

    def _own(self, made: Tensor) -> Tensor:
        """Return the errors of its formats: all of them without a copy, where that is so."""
        chosen = self.columns.errors
        return made if chosen == tuple(range(len(made))) else made[list(chosen)]


def input_sums(calls: Sequence[Call]) -> InputSums | None:
    """Return the sums over the inputs of all calls, None where no input is rounded."""
    total: InputSums | None = None
    for call in calls:
        if call.sums is not None:
            total = call.sums if total is None else total + call.sums
    return total


def _rounded(call: Call, width: int | None) -> Use:
    """Return a call's use with inputs of a width; a lookup has none to round."""
    return call.rounded[width] if width is not None and call.rounded else call.use
