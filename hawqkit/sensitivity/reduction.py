"""Reduce one layer's gradient to its numbers as soon as it exists, and forget the gradient.

Letters: B sequences, F formats of this layer, R rows at once, C columns, k sampled positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.quantize.errors_of import LayerErrors
from hawqkit.sensitivity.positions import PositionSampler
from hawqkit.sensitivity.uses import Use

# Entries of errors made at once: 2^21 float32 are 8 MB, the order of a last-level cache's share.
CPU_ENTRIES = 1 << 21
DEVICE_ENTRIES = 1 << 26


@dataclass(frozen=True, slots=True)
class LayerSums:
    """What one micro-batch says about one layer; raw sums by sequence, see `records.Samples`."""

    gram: Tensor  # (B, B) g_b . g_b'
    directional: Tensor  # (B, F) g_b . dW_f
    token_norm: Tensor  # (B,)
    token: Tensor  # (B, F)
    token_summed: Tensor  # (B, F)


class Scratch:
    """One buffer that every layer's errors are made in: fresh memory costs a fault a page."""

    def __init__(self) -> None:
        self._flat = torch.empty(0)

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialized tensor of `shape`, valid until the next call."""
        count = math.prod(shape)
        flat = self._flat
        if flat.numel() < count or flat.dtype != like.dtype or flat.device != like.device:
            self._flat = flat = like.new_empty(count)
        return flat[:count].view(shape)


def reduce_layer(
    uses: list[Use],
    weight: Tensor,
    errors: LayerErrors,
    sampler: PositionSampler | None,
    scratch: Scratch,
) -> LayerSums:
    """Reduce all uses of a weight: `g_b = sum over uses`, added before anything is squared.

    Args:
        uses: every use of the weight in this pass.
        weight: (rows, columns).
        errors: makes dW_f for any rows.
        sampler: of the token score's positions; None leaves that score out.
        scratch: where errors are made.
    """
    batch, formats = len(uses[0].gradients), len(errors.formats)
    like = weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
    gram, directional = like.new_zeros(batch, batch), like.new_zeros(batch, formats)
    positions = [sampler.at(use.length) for use in uses] if sampler is not None else []
    squares = [like.new_zeros(*at.index.shape, formats) for at in positions]
    sums = [like.new_zeros(*at.index.shape, formats) for at in positions]
    for rows in _row_chunks(uses, weight, max(formats, batch)):
        gradient = uses[0].gradient(rows)
        for use in uses[1:]:
            gradient += use.gradient(rows)
        flat = gradient.flatten(1)  # (B, R C)
        gram += flat @ flat.T
        if not formats:
            continue
        made = scratch.take(like, formats, *gradient.shape[1:])  # (F, R, C)
        errors.fill(weight, made, rows)
        # In this order: BLAS takes twice as long for a few rows times many columns.
        directional += (made.flatten(1) @ flat.T).T
        for use, at, square, total in zip(uses, positions, squares, sums, strict=False):
            more_square, more_total = use.responses(rows, made, at)
            square += more_square
            total += more_total
    norm, empty = like.new_zeros(batch), like.new_zeros(batch, formats)
    token, summed = empty, empty.clone()
    for use, at, square, total in zip(uses, positions, squares, sums, strict=False):
        w = at.weight.to(like)
        norm = norm + (use.norms(at) * w).sum(-1)
        token = token + (square * w[..., None]).sum(1)
        summed = summed + (total.square() * w[..., None]).sum(1)
    return LayerSums(gram, directional, norm, token, summed)


def _row_chunks(uses: list[Use], weight: Tensor, copies: int) -> Iterator[Tensor | slice]:
    """Yield the rows to handle at once: slices, or for a lone lookup the rows that it touches."""
    total, columns = weight.shape
    limit = CPU_ENTRIES if weight.device.type == "cpu" else DEVICE_ENTRIES
    step = max(1, limit // (columns * max(copies, 1)))
    touched = uses[0].rows(total) if len(uses) == 1 else None
    if touched is not None:
        yield from torch.split(touched, step)
        return
    together = uses[0].rows_together or total
    if step >= together:
        step -= step % together  # whole groups
        together = total
    for group in range(0, total, together):
        for start in range(group, group + together, step):
            yield slice(start, min(start + step, group + together))
