"""Reduce one layer's gradient to its numbers as soon as it exists, and forget the gradient.

Letters: B sequences, F formats of this layer, W different weights among them, A widths of rounded
inputs, R rows at once, C columns, k sampled positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hawqkit.quantize.errors_of import LayerErrors
from hawqkit.sensitivity.columns import Columns, Tally, input_sums
from hawqkit.sensitivity.input_terms import Call, InputSums
from hawqkit.sensitivity.positions import PositionSampler
from hawqkit.sensitivity.uses import Use, count_of

# Entries of errors made at once: 2^21 float32 are 8 MB, the order of a last-level cache's share.
CPU_ENTRIES = 1 << 21
DEVICE_ENTRIES = 1 << 26
CACHED_ENTRIES = 1 << 18  # of gradients, 1 MB of float32: what a core's own cache holds


@dataclass(frozen=True, slots=True)
class LayerSums:
    """What one micro-batch says about one layer; raw sums by sequence, see `records.Samples`."""

    gram: Tensor  # (B / p, p, p) g_b . g_b' within blocks of p examples; padded with zeros
    directional: Tensor  # (B, F) g_b . dW_f
    token_norm: Tensor  # (B,)
    token: Tensor  # (B, F)
    token_summed: Tensor  # (B, F)
    inputs: InputSums | None = None  # (B, A) each, where inputs are rounded


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
    calls: Sequence[Call],
    weight: Tensor,
    errors: LayerErrors,
    columns: Sequence[Columns],
    sampler: PositionSampler | None,
    scratch: Scratch,
    paired: int,
) -> LayerSums:
    """Reduce all uses of a weight: `g_b = sum over uses`, added before anything is squared.

    Args:
        calls: every use of the weight in this pass.
        weight: (rows, columns).
        errors: makes dW_f for any rows.
        columns: which error and which inputs make each column, see `plan_columns`.
        sampler: of the token score's positions; None leaves that score out.
        scratch: where errors are made.
        paired: examples of a block, within which products of gradients are taken. All pairs of a
            large batch would cost more than the gradients.
    """
    uses = [call.use for call in calls]
    batch, formats = len(uses[0].gradients), len(errors.formats)
    like = weight.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
    gram = like.new_zeros(-(-batch // paired), paired, paired)
    tallies = [Tally(c, calls, sampler, like) for c in columns]
    for rows in _row_chunks(uses, weight, max(formats, min(batch, paired))):
        made = like.new_empty(0)
        if formats:
            made = scratch.take(like, formats, count_of(rows), weight.shape[1])  # (W, R, C)
            errors.fill(weight, made, rows)
            made = uses[0].arrange(made)
        for some in _example_blocks(batch, count_of(rows) * weight.shape[1], paired, weight):
            flat = _gradient(uses, rows, some)
            _add_gram(gram[some.start // paired :], flat)
            for tally in tallies:
                own = _gradient(tally.uses, rows, some) if tally.needs_gradient else flat
                tally.add(made, own, some)
        for tally in tallies:
            tally.respond(made, rows)
    norm = like.new_zeros(batch)
    for use in uses:
        if sampler is not None:
            at = sampler.at(use.length)
            norm = norm + (use.norms(at) * at.weight.to(like)).sum(-1)
    order = torch.tensor([f for c in columns for f in c.formats], dtype=torch.int64).argsort()
    together = zip(*(tally.finish() for tally in tallies), strict=True)
    directional, token, summed = (torch.cat(part, 1)[:, order.to(like.device)] for part in together)
    return LayerSums(gram, directional, norm, token, summed, input_sums(calls))


def _gradient(uses: Sequence[Use], rows: Tensor | slice, some: slice) -> Tensor:
    """Return the gradients of some rows for some examples, (b, R C)."""
    gradient = uses[0].gradient(rows, some)
    for use in uses[1:]:
        gradient += use.gradient(rows, some)
    return gradient.flatten(1)


def _example_blocks(batch: int, entries: int, paired: int, weight: Tensor) -> Iterator[slice]:
    """Yield the examples to handle at once, so that their gradients stay in the cache.

    Whole blocks of pairs, and at least one; all examples on an accelerator.
    """
    fitting = CACHED_ENTRIES // max(entries, 1) if weight.device.type == "cpu" else batch
    step = max(paired, fitting - fitting % paired)
    for start in range(0, batch, step):
        yield slice(start, min(start + step, batch))


def _add_gram(gram: Tensor, flat: Tensor) -> None:
    """Add the products of gradients (b, n) within blocks to the first of gram (blocks, p, p)."""
    paired, whole = gram.shape[1], len(flat) // gram.shape[1]
    if whole:
        part = flat[: whole * paired].view(whole, paired, -1)
        gram[:whole].baddbmm_(part, part.transpose(1, 2))
    rest = flat[whole * paired :]
    if len(rest):
        gram[whole, : len(rest), : len(rest)] += rest @ rest.T


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
