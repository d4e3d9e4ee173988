"""Mixes on synthetic sensitivities: solving, baselines and sizes, by other means than hawqkit's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hawqkit.formats import parse_format
from hawqkit.records import Sensitivities, Totals

Array = NDArray[np.float64]
Picks = NDArray[np.int64]

HIDDEN, VOCABULARY = 576, 49152


def solve(sensitivities: Sensitivities, values: Array, budget: float) -> Picks:
    """Return the picks on the lower convex hull that need at most `budget` average bits."""
    bits = np.array(
        [parse_format(name).bits or 32 for name in sensitivities.formats], dtype=np.float64
    )
    numel = np.array([layer.numel for layer in sensitivities.layers], dtype=np.float64)
    cost = np.where(np.isnan(values), np.inf, values)
    low, high = 0.0, 1e3 * float(np.nanmax(values))
    for _ in range(120):
        price = 0.5 * (low + high)
        picks = (cost + price * numel[:, None] * bits / numel.sum()).argmin(axis=1)
        if (numel * bits[picks]).sum() / numel.sum() > budget:
            low = price
        else:
            high = price
    return np.asarray(
        (cost + high * numel[:, None] * bits / numel.sum()).argmin(axis=1), dtype=np.int64
    )


def fixed(sensitivities: Sensitivities, wanted: Picks) -> Picks:
    """Return the wanted columns, moved to the finest format where one does not fit."""
    picks = wanted.astype(np.int64).copy()
    for row, layer in enumerate(sensitivities.layers):
        if not parse_format(sensitivities.formats[picks[row]]).fits(layer.columns):
            picks[row] = max(
                c
                for c, f in enumerate(sensitivities.formats)
                if parse_format(f).fits(layer.columns)
            )
    return picks


def summed(values: Array, picks: Picks) -> float:
    """Return the summed score of the picked columns."""
    return float(values[np.arange(len(picks)), picks].sum())


def names_of(sensitivities: Sensitivities, picks: Picks) -> dict[str, str]:
    """Return layer name -> format name."""
    return {
        layer.name: sensitivities.formats[p]
        for layer, p in zip(sensitivities.layers, picks, strict=True)
    }


def totals_of(sensitivities: Sensitivities, picks: Picks) -> Totals:
    """Return the sizes of the picked formats; the embedding stays as stored."""
    numel = sum(layer.numel for layer in sensitivities.layers)
    code = total = 0
    for layer, pick in zip(sensitivities.layers, picks, strict=True):
        format_ = parse_format(sensitivities.formats[pick])
        code += layer.numel * format_.code_bits(layer.dtype_bits)
        total += format_.total_bits(layer.rows, layer.columns, layer.dtype_bits)
    rest = VOCABULARY * HIDDEN * 4
    return Totals(
        code / numel, total / numel, {"compressed-tensors": total // 8 + rest, "bits": 9_412}
    )


def widest(sensitivities: Sensitivities, budget: float) -> int:
    bits = [parse_format(name).bits or 32 for name in sensitivities.formats]
    return max((c for c, b in enumerate(bits) if b <= budget), default=0)


def ends(sensitivities: Sensitivities, budget: float) -> Picks:
    inner = max(widest(sensitivities, budget) - 1, 0)
    last = max(layer.block or 0 for layer in sensitivities.layers)
    ends = [layer.block in (0, 1, last - 1, last) for layer in sensitivities.layers]
    wide = len(sensitivities.formats) - 1
    return fixed(sensitivities, np.array([wide if e else inner for e in ends]))
