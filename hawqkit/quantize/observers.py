"""Observers: from all entries of a layer's inputs to the range that a grid of few bits covers.

Entries are counted in bins whose width is a power of two, at multiples of it. When a larger entry
comes, neighbors are merged until it fits, which is exact: the counts depend on the entries alone,
not on their order, their batches, or the process that saw them. The width is at most 1/4096 of the
largest magnitude, and that is the error of a percentile.

Letters: N bins, K candidates, Q levels of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hawqkit.errors import NumericalError

BINS = 1 << 14
_HALF = BINS // 2
# Below it, a multiplication by 1 / width would overflow float32.
_LEAST_EXPONENT = -120

Array = NDArray[np.float64]
Range = tuple[float, float]


@dataclass(slots=True)
class Seen:
    """Extremes and counts of all entries so far; two of them merge to what one would have seen.

    Attributes:
        bins: (N,) int64 entries in [i, i + 1) 2^exponent, i from -N/2; None if not asked for.
        exponent: of the bins' width.
        zeros: entries that are exactly 0.
        count: all entries.
        low: smallest entry.
        high: largest entry.
    """

    bins: NDArray[np.int64] | None = None
    exponent: int | None = None
    zeros: int = 0
    count: int = 0
    low: float = math.inf
    high: float = -math.inf

    @torch.no_grad()
    def add(self, values: Tensor, *, counted: bool) -> None:
        """Take more entries in.

        Args:
            values: any shape and floating dtype.
            counted: whether bins are needed, not only the extremes.

        Raises:
            NumericalError: an entry is NaN or infinite.
        """
        if not values.numel():
            return
        flat = values.detach().flatten().to(torch.promote_types(values.dtype, torch.float32))
        low, high = (float(v) for v in torch.aminmax(flat))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(flat)).sum())
            raise NumericalError(f"{bad} of {flat.numel()} entries are NaN or infinite")
        new = Seen(None, None, 0, flat.numel(), low, high)
        most = max(-low, high)
        if counted and most > 0:
            least = math.frexp(most)[1] - (_HALF.bit_length() - 1)  # |x| < N/2 2^least
            exponent = least if self.exponent is None else max(least, self.exponent)
            wide = flat.double() if exponent < _LEAST_EXPONENT else flat
            index = torch.floor(wide * 2.0**-exponent).long().add_(_HALF)
            new.exponent = exponent
            new.bins = torch.bincount(index, minlength=BINS).cpu().numpy()
        if counted:
            new.zeros = int((flat == 0).sum())
        self.merge(new)

    def merge(self, other: Seen) -> None:
        """Take in what another has seen."""
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.zeros, self.count = self.zeros + other.zeros, self.count + other.count
        if other.bins is None or other.exponent is None:
            return
        if self.bins is None or self.exponent is None:
            self.bins, self.exponent = other.bins, other.exponent
            return
        exponent = max(self.exponent, other.exponent)
        mine = _widened(self.bins, exponent - self.exponent)
        self.bins = mine + _widened(other.bins, exponent - other.exponent)
        self.exponent = exponent

    def apart_from_zeros(self) -> tuple[Array, float]:
        """Return counts (N,) of the entries that are not 0, and the bins' width."""
        if self.bins is None or self.exponent is None:
            return np.zeros(BINS), 1.0
        counts = self.bins.astype(np.float64)
        counts[_HALF] -= self.zeros
        return counts, 2.0**self.exponent


def _widened(bins: NDArray[np.int64], times: int) -> NDArray[np.int64]:
    """Return counts in bins 2^times as wide: pairs that begin at even multiples are merged."""
    for _ in range(times):
        wide = np.zeros_like(bins)
        wide[_HALF // 2 : _HALF // 2 + _HALF] = bins.reshape(-1, 2).sum(1)
        bins = wide
    return bins


def min_max(seen: Seen, bits: int, symmetric: bool, percentile: float | None) -> Range:
    """All entries: `(min, max)`."""
    return seen.low, seen.high


def by_percentile(seen: Seen, bits: int, symmetric: bool, percentile: float | None) -> Range:
    """At most the share q = 1 - percentile/100 of the entries lies beyond each end.

    Of a symmetric range, |x| has that share beyond the end. The outer edge of a bin is taken, so
    that an end is too wide by at most 1/4096 of the largest magnitude. A range that holds nothing
    but 0, as of a layer whose inputs are 0 but for a share below q, is widened to all entries.
    """
    assert percentile is not None
    counts, width = seen.apart_from_zeros()
    beyond = (100 - percentile) / 100 * seen.count * (1 + 1e-12)  # whole where it should be
    above, below = counts[_HALF:], counts[:_HALF][::-1]  # outwards from 0
    if symmetric:
        above = below = above + below
    high, low = (_outer_edge(side, beyond) * width for side in (above, below))
    if high == low == 0:
        return seen.low, seen.high
    return max(-low, seen.low), min(high, seen.high)


def _outer_edge(outwards: Array, beyond: float) -> int:
    """Return the least number of bins from 0 on outside of which at most `beyond` entries lie."""
    outside = np.concatenate([np.cumsum(outwards[::-1])[::-1], [0.0]])
    return int(np.argmax(outside <= beyond))


def least_squares(seen: Seen, bits: int, symmetric: bool, percentile: float | None) -> Range:
    """The range whose grid has the smallest mean squared rounding error.

        min over low, high of  sum_x (Q(x) - x)^2

    over ends that are the extremes times 2^(-k/32), k from 0 to 320: a coarse grid of both ends,
    then finer ones around the best. Entries of a bin count as its center.
    """
    counts, width = seen.apart_from_zeros()
    moments = _Moments(counts, width, bits, symmetric)
    lows = [seen.low] if seen.low < 0 else [0.0]
    highs = [seen.high] if seen.high > 0 else [0.0]
    if symmetric and seen.low < 0:
        lows, highs = [0.0], [max(-seen.low, seen.high)]
    exponents = np.arange(0.0, 10.5, 0.5)
    best = (lows[0], highs[0])
    for step in (0.5, 0.125, 1 / 32):
        offsets = exponents if step == 0.5 else np.arange(-4, 5) * step
        low = np.unique(np.maximum(best[0] * 2.0**-offsets, lows[0]))
        high = np.unique(np.minimum(best[1] * 2.0**-offsets, highs[0]))[::-1]
        pairs = np.array([(a, b) for a in low for b in high])
        error = moments.error(pairs[:, 0], pairs[:, 1])
        best = float(pairs[error.argmin(), 0]), float(pairs[error.argmin(), 1])
    if symmetric and seen.low < 0:
        return -best[1], best[1]
    return best


class _Moments:
    """Squared rounding errors of many grids from cumulated counts, sums and squares of the bins."""

    def __init__(self, counts: Array, width: float, bits: int, symmetric: bool) -> None:
        centers = (np.arange(BINS) - _HALF + 0.5) * width
        signed = symmetric and bool(counts[:_HALF].any())
        self._width, self._bits, self._signed = width, bits, signed
        powers = np.stack([counts, counts * centers, counts * centers**2])
        self._sums = np.concatenate([np.zeros((3, 1)), powers.cumsum(1)], 1)  # (3, N + 1)

    def error(self, low: Array, high: Array) -> Array:
        """Return the summed squared error of K grids; `high` is the magnitude of a signed one."""
        half, steps = 1 << (self._bits - 1), (1 << self._bits) - 1
        scale = high / (half - 1) if self._signed else (high - low) / steps
        scale = np.where(scale == 0, 1.0, scale)
        zero = np.full_like(scale, half) if self._signed else np.rint(-low / scale)
        values = (np.arange(steps + 1) - zero[:, None]) * scale[:, None]  # (K, Q)
        between = (values[:, 1:] + values[:, :-1]) / 2 / self._width
        edges = np.clip(np.rint(between), -_HALF, _HALF).astype(np.int64) + _HALF
        ends = np.full((len(edges), 1), 0)
        edges = np.concatenate([ends, edges, ends + BINS], 1)  # (K, Q + 1)
        n, first, second = np.diff(self._sums[:, edges], axis=2)  # (K, Q)
        total: Array = (second - 2 * values * first + values**2 * n).sum(1)
        return total


CANDIDATES = 256  # thresholds that the entropy observer compares, at most
_MERGED = 4  # bins: what is left is 1,024 to 2,048 of them up to the largest magnitude


def least_divergence(seen: Seen, bits: int, symmetric: bool, percentile: float | None) -> Range:
    """The threshold T of |x| with the smallest KL divergence, as TensorRT's calibration has it.

    For each T: P is the histogram up to T with everything beyond in its last bin; Q is the
    histogram up to T, without what lies beyond, in as many levels as the grid has, each spread
    evenly over its bins that are not empty. T of the smallest KL(P || Q) is taken (Migacz 2017,
    "8-bit inference with TensorRT"). Entries that are exactly 0 are left out: each grid holds 0. Of
    signed data a side has 2^(bits-1) levels, of data without a sign 2^bits; the range is
    [max(min, -T), min(max, T)].
    """
    counts, width = seen.apart_from_zeros()
    magnitude = counts[_HALF:] + counts[:_HALF][::-1]
    merged = magnitude.reshape(-1, _MERGED).sum(1)
    if not merged.any():
        return seen.low, seen.high
    last = int(np.flatnonzero(merged)[-1]) + 1
    merged = merged[:last]
    levels = min(1 << (bits - 1 if seen.low < 0 else bits), last)
    stride = max(1, -(-(last - levels) // CANDIDATES))
    ends = [*range(levels, last, stride), last]
    losses = [_divergence(merged, end, levels) for end in ends]
    threshold = ends[int(np.argmin(losses))] * _MERGED * width
    return max(seen.low, -threshold), min(seen.high, threshold)


def _divergence(counts: Array, end: int, levels: int) -> float:
    """Return KL(P || Q) of one threshold; infinite where Q has nothing that P has."""
    reference = counts[:end].copy()
    starts = np.arange(levels) * end // levels
    sums = np.add.reduceat(counts[:end], starts)
    reference[-1] += counts[end:].sum()
    filled = np.add.reduceat((reference > 0).astype(np.float64), starts)
    spread = np.repeat(sums / np.maximum(filled, 1), np.diff([*starts, end]))
    there = reference > 0
    p, q = reference[there], spread[there]
    if not q.all():
        return math.inf
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


FIND: dict[str, Callable[[Seen, int, bool, float | None], Range]] = {
    "min-max": min_max,
    "percentile": by_percentile,
    "mse": least_squares,
    "entropy": least_divergence,
}


def find_range(
    seen: Seen, observer: str, bits: int, *, symmetric: bool, percentile: float | None
) -> Range:
    """Return the range of an observer, widened to hold 0; `(0, 0)` if nothing but 0 was seen.

    A symmetric range of data below and above 0 has ends of one magnitude; data without a sign keep
    the range `(0, high)`, whose grid spends no code on what never comes.
    """
    if not seen.count:
        return 0.0, 0.0
    low, high = FIND[observer](seen, bits, symmetric, percentile)
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric and low < 0:
        high = max(-low, high)
        low = -high
    return low, high
