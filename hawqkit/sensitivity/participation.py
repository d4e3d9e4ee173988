"""Effective rank from the Gram matrices of the probe: |G|_F and the participation ratio."""

from __future__ import annotations

import numpy as np

from hawqkit.records import Floats, Integers, Samples


def participation_ratios(samples: Samples, rows: Integers | None = None) -> tuple[Floats, float]:
    """Return `tr(G)^2 / |G|_F^2` of every layer (L,) and of all layers together.

    Both come from pairs (s, s') of different, so independent, sequences of one micro-batch:

        tr(G)^2  = sum |g_s|^2 |g_s'|^2 / sum n_s n_s'
        |G|_F^2  = sum (g_s . g_s')^2   / sum n_s n_s'

    For the whole network squared norms and products are summed over layers first. NaN where there
    is no pair (micro-batches of one sequence).
    """
    keep = np.ones(len(samples.pairs), dtype=bool)
    if rows is not None:
        keep = np.asarray(np.isin(samples.pairs, rows).all(axis=1), dtype=bool)
    first, second = samples.pairs[keep].T
    gram, squares = samples.gram[keep], samples.squared_gradient
    if not len(gram):
        return np.full(squares.shape[1], np.nan), float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        layers = (squares[first] * squares[second]).sum(0) / (gram**2).sum(0)
        whole = squares.sum(1)
        network = float((whole[first] * whole[second]).sum() / (gram.sum(1) ** 2).sum())
    return layers, network
