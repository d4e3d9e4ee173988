"""Observers of inputs against loops, dense searches and the definition of a percentile."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hawqkit.errors import NumericalError
from hawqkit.quantize.observers import BINS, Seen, find_range
from hawqkit.records import make_grid


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def looked_at(values: Tensor, parts: int = 1) -> Seen:
    seen = Seen()
    for part in values.flatten().chunk(parts):
        seen.add(part, counted=True)
    return seen


def brute(values: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
    """Mean squared rounding error of a range, by rounding every entry to the nearest level."""
    grid = make_grid(low, high, bits, symmetric=symmetric)
    levels = (np.arange(2**bits) - grid.zero) * grid.scale
    x = values.flatten().numpy()
    nearest = np.abs(x[:, None] - levels).min(1)
    return float((nearest**2).mean())


# --- what is seen ---


@pytest.mark.parametrize("size", [1e-42, 1e-3, 1.0, 7e4, 1e30])
def test_counts_do_not_depend_on_order_and_batches(size: float) -> None:
    values = (draw((4000,)) * size).float()
    values[::7] = 0.0
    whole = looked_at(values)
    order = torch.randperm(4000, generator=torch.Generator().manual_seed(1))
    for parts, shuffled in ((1, order), (13, order), (400, order.flip(0))):
        other = looked_at(values[shuffled], parts)
        assert other.bins is not None
        np.testing.assert_array_equal(other.bins, whole.bins)
        for name in ("exponent", "zeros", "count", "low", "high"):
            assert getattr(other, name) == getattr(whole, name), name
    merged = looked_at(values[:100])
    merged.merge(looked_at(values[100:]))
    np.testing.assert_array_equal(merged.bins, whole.bins)
    assert whole.bins.sum() == whole.count == 4000
    assert whole.zeros == int((values == 0).sum())
    largest = float(values.abs().max())
    assert 2.0**whole.exponent <= largest / 4096
    edges = np.ldexp(np.arange(BINS + 1) - BINS // 2, whole.exponent)
    np.testing.assert_array_equal(whole.bins, np.histogram(values.double().numpy(), edges)[0])


def test_nothing_but_zeros_and_constants_have_ranges() -> None:
    for observer in ("min-max", "percentile", "mse", "entropy"):
        for symmetric in (False, True):
            options = {"symmetric": symmetric, "percentile": 99.0}
            assert find_range(looked_at(torch.zeros(50)), observer, 4, **options) == (0.0, 0.0)
            assert find_range(Seen(), observer, 4, **options) == (0.0, 0.0)
            low, high = find_range(looked_at(torch.full((50,), 2.5)), observer, 4, **options)
            assert (low, round(high, 2)) == (0.0, 2.5)
            low, high = find_range(looked_at(torch.full((50,), -2.5)), observer, 4, **options)
            assert (round(low, 2), high) == (-2.5, 2.5 if symmetric else 0.0)


def test_nan_and_infinity_are_refused_with_their_number() -> None:
    for odd in (math.nan, math.inf, -math.inf):
        values = draw((20,))
        values[[3, 8]] = odd
        with pytest.raises(NumericalError, match="2 of 20 entries"):
            looked_at(values)


# --- observers ---


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_a_percentile_leaves_its_share_outside_and_is_no_wider_than_a_bin(
    percentile: float,
) -> None:
    values = draw((50_000,)).abs_().pow_(1.5) * torch.where(draw((50_000,), 1) < 0.3, -1.0, 1.0)
    seen, ordered = looked_at(values), values.sort().values
    options = {"symmetric": False, "percentile": percentile}
    low, high = find_range(seen, "percentile", 8, **options)
    allowed = round((100 - percentile) / 100 * 50_000)
    width = float(values.abs().max()) / 4096
    for end, exact in ((high, ordered[-1 - allowed]), (-low, -ordered[allowed])):
        assert exact <= end <= exact + width
    assert int((values > high).sum()) <= allowed
    assert int((values < low).sum()) <= allowed
    low, high = find_range(seen, "percentile", 8, symmetric=True, percentile=percentile)
    exact = values.abs().sort().values[-1 - allowed]
    assert exact <= high <= exact + width
    assert low == -high


def test_a_percentile_that_leaves_nothing_takes_all_entries() -> None:
    values = torch.zeros(10_000)
    values[:5] = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0])
    options = {"symmetric": False, "percentile": 99.9}
    assert find_range(looked_at(values), "percentile", 8, **options) == (0.0, 3.0)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "relu", "skewed", "outlier"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_mse_range_is_as_good_as_the_best_of_a_dense_search(
    kind: str, bits: int, symmetric: bool
) -> None:
    values = draw((800,))
    if kind == "relu":
        values = values.clamp(min=0)
    elif kind == "skewed":
        values = nn.functional.gelu(2 * values)
    elif kind == "outlier":
        values[17] = 40.0
    seen = looked_at(values)
    low, high = find_range(seen, "mse", bits, symmetric=symmetric, percentile=None)
    found = brute(values, low, high, bits, symmetric)
    ends = np.linspace(0.04, 1.0, 25)
    if symmetric:
        most = float(values.abs().max())
        bottom = -most if seen.low < 0 else 0.0
        rivals = [brute(values, r * bottom, r * most, bits, True) for r in ends]
    else:
        some = ends[::3] if seen.low < 0 else [1.0]
        rivals = [brute(values, r * min(seen.low, 0), s * seen.high, bits, False)
                  for r in some for s in ends]  # fmt: skip
    # Ends are found to 2^(1/32), and an entry counts as the center of its bin.
    assert found <= min(rivals) * 1.03
    everything = brute(values, *find_range(seen, "min-max", bits, symmetric=symmetric,
                                           percentile=None), bits, symmetric)  # fmt: skip
    assert found <= everything * 1.01


def divergence(counts: list[float], end: int, levels: int) -> float:
    """KL(P || Q) of the published calibration, in loops."""
    p = list(counts[:end])
    p[-1] += sum(counts[end:])
    starts = [k * end // levels for k in range(levels)] + [end]
    q = [0.0] * end
    for first, last in pairwise(starts):
        there = [j for j in range(first, last) if p[j] > 0]
        for j in there:
            q[j] = sum(counts[first:last]) / len(there)
    total_p, total_q = sum(p), sum(q)
    loss = 0.0
    for a, b in zip(p, q, strict=True):
        if a > 0:
            if b == 0:
                return math.inf
            loss += a / total_p * math.log((a / total_p) / (b / total_q))
    return loss


@pytest.mark.parametrize(("bits", "signed"), [(4, True), (8, False)])
def test_the_entropy_range_has_the_least_divergence_of_all_thresholds(
    bits: int, signed: bool
) -> None:
    values = draw((20_000,)).abs_().pow_(2) * (torch.where(draw((20_000,), 1) < 0, -1, 1)
                                               if signed else 1)  # fmt: skip
    seen = looked_at(values)
    low, high = find_range(seen, "entropy", bits, symmetric=True, percentile=None)
    assert (low < 0) == signed
    width = 4 * 2.0**seen.exponent
    last = math.ceil(seen.high / width) if not signed else math.ceil(
        max(seen.high, -seen.low) / width)  # fmt: skip
    counts = np.histogram(values.abs().numpy(), np.arange(last + 1) * width)[0].astype(float)
    levels = 2 ** (bits - 1) if signed else 2**bits
    ends = [round(min(high, 1e9) / width)]
    ends += list(range(levels, last, max(1, (last - levels) // 24)))
    losses = [divergence(list(counts), min(e, last), levels) for e in ends]
    assert losses[0] <= min(losses) * (1 + 1e-9)
    assert high < seen.high  # a heavy tail is cut
