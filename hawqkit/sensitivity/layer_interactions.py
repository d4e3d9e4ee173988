"""What the errors of two layers do together, from the probe's samples.

A score adds up what layers do by themselves. Their joint effect has products of two layers beside
the squares: with p = g_s . dW_l of example s

    1/2 E (sum_l p_l)^2 = 1/2 sum_l E p_l^2 + 1/2 sum over l != m of E p_l p_m

In convolutional networks with few bits these products make half of the loss: rounding shrinks the
weights of every layer alike, so errors do not cancel. They come from the samples that the probe has
anyhow, and are noisy, so that a choice which trusts them whole follows their noise; half of them
chose best (docs/hawq.md).

Letters: S examples, G groups, F formats.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawqkit.allocation.interactions import Interactions
from hawqkit.records import Floats, Integers, Samples

SHARE = 0.5


def interactions_of(
    samples: Samples,
    groups: Sequence[Sequence[int]],
    rows: Integers,
    weights: Floats | None = None,
    share: float = SHARE,
) -> Interactions:
    """Return the products of all groups' errors, times `share`.

    Args:
        samples: of the probe.
        groups: rows of the layers that share a format.
        rows: the examples to use.
        weights: (S,) multiplicity of each, for a bootstrap.
        share: of the products that enters the choice.
    """
    p = np.nan_to_num(samples.directional[rows])  # (S, L, F); a cell that does not exist is 0
    w = np.ones(len(rows)) if weights is None else weights
    count = float((samples.count[rows] * w).sum())
    together = np.stack([p[:, list(members)].sum(1) for members in groups], axis=1)  # (S, G, F)
    shape = together.shape[1:]
    flat = (together * np.sqrt(w)[:, None, None]).reshape(len(rows), -1)
    products = (0.5 * share / count) * (flat.T @ flat)
    squares = np.einsum("s,slf->lf", w, p**2)  # (L, F), each layer by itself
    alone = np.stack([squares[list(members)].sum(0) for members in groups])  # (G, F)
    own = products.diagonal().reshape(shape) - (0.5 * share / count) * alone
    return Interactions(products.reshape(*shape, *shape), own)
