"""Gauss rules of Lanczos tridiagonals, and what they prove about a distribution function. No torch.

Letters: S draws, m steps.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import InputError
from hawqkit.records.spectral import student_quantile

Array = NDArray[np.float64]


def gauss_rule(alphas: Array, betas: Array) -> tuple[Array, Array]:
    """Return nodes, rising, and weights of tridiagonals, (S, m) each (Golub and Welsch 1969).

    Args:
        alphas: (S, m) diagonals.
        betas: (S, m - 1) off-diagonals.

    >>> nodes, weights = gauss_rule(np.array([[1.0, 1.0]]), np.array([[1.0]]))
    >>> nodes.round(12).tolist(), weights.round(12).tolist()
    ([[0.0, 2.0]], [[0.5, 0.5]])
    """
    draws, steps = alphas.shape
    T = np.zeros((draws, steps, steps))
    i = np.arange(steps)
    T[:, i, i] = alphas
    T[:, i[1:], i[:-1]] = betas
    nodes, vectors = np.linalg.eigh(T)  # reads the lower triangle
    return nodes, vectors[:, 0, :] ** 2


def bound_below(
    alphas: Array, betas: Array, complete: NDArray[np.bool_], x: float
) -> tuple[Array, Array]:
    """Return sharp bounds, draw by draw, of the measure's mass strictly below and up to x.

    Chebyshev, Markov and Stieltjes: of all measures with the moments that a tridiagonal holds, the
    rule that has x itself as a node (a Gauss-Radau rule) has the least mass below x and the most up
    to x. Its last diagonal entry is `x + beta^2 / d`, with d the last pivot of `T - x` without its
    last row. Where x is all but a node of the smaller rule that entry is not finite: then the Gauss
    rule itself bounds the mass, one node wider on either side. A complete draw is its measure.

    Args:
        alphas: (S, m), NaN after a draw's end.
        betas: (S, m - 1).
        complete: (S,) draws whose measure is known whole.
        x: threshold.

    Returns:
        (S,) L and (S,) U with L <= F(x-) <= F(x) <= U.
    """
    lower, upper = np.zeros(len(alphas)), np.ones(len(alphas))
    if complete.any():
        a, b = np.nan_to_num(alphas[complete]), np.nan_to_num(betas[complete])
        nodes, weights = gauss_rule(a, b)
        near = 1e-12 * np.maximum(np.abs(nodes).max(1, keepdims=True), abs(x))
        lower[complete] = (weights * (nodes < x - near)).sum(1)
        upper[complete] = (weights * (nodes <= x + near)).sum(1)
    part = ~complete
    if part.any():
        lower[part], upper[part] = _bound_incomplete(alphas[part], betas[part], x)
    return lower, upper


def _bound_incomplete(alphas: Array, betas: Array, x: float) -> tuple[Array, Array]:
    scale = np.maximum(np.abs(alphas).max(1), np.abs(betas).max(1, initial=0.0))
    scale = np.maximum(scale, abs(x)) + np.finfo(np.float64).tiny
    shift = np.zeros(len(alphas))
    for k in range(alphas.shape[1] - 1):
        pivot = alphas[:, k] - x - shift
        tiny = 1e-300 + 1e-16 * scale
        pivot = np.where(np.abs(pivot) < tiny, np.copysign(tiny, pivot), pivot)
        shift = betas[:, k] ** 2 / pivot
    # Rounding in the nodes is eps times the largest entry: 1e4 keeps it below 1e-11 of the scale.
    radau = np.abs(shift) < 1e4 * scale
    last = alphas.copy()
    last[radau, -1] = x + shift[radau]
    nodes, weights = gauss_rule(last, betas)
    column = np.arange(nodes.shape[1])[None, :]
    at = np.abs(nodes - x).argmin(1)[:, None]  # the node that is x
    lower = (weights * (column < at)).sum(1)
    upper = (weights * (column <= at)).sum(1)
    under = (nodes < x).sum(1)[:, None]  # Gauss: x stands between nodes under - 1 and under
    wide_lower = (weights * (column < under - 1)).sum(1)
    wide_upper = (weights * (column <= under)).sum(1)
    return np.where(radau, lower, wide_lower), np.where(radau, upper, wide_upper)


def share_interval(
    lower: Array, upper: Array, dimensions: int, confidence: float
) -> tuple[float, float]:
    """Return the interval of an eigenvalue share from bounds of each draw.

    The bounds hold for each draw's own measure; its sampling error widens them, in two ways of
    which the wider is kept on either side:

    - Student's t over the draws;
    - the law of a draw. The share that a vector uniform on the sphere of d dimensions gives to an
      r-dimensional space is Beta(r/2, (d-r)/2); the mean of S of them is close to the Beta with its
      mean p and variance `2 p (1-p) / (S (d+2))`, whose quantiles are solved for p, as Clopper and
      Pearson do. A small r makes draws skewed, which t would not see.

    Args:
        lower: (S,).
        upper: (S,).
        dimensions: d.
        confidence: two-sided.
    """
    draws, tail = len(lower), (1 - confidence) / 2
    low = _solve_share(float(lower.mean()), dimensions, draws, 1 - tail)
    high = _solve_share(float(upper.mean()), dimensions, draws, tail)
    if draws > 1:
        quantile = student_quantile(1 - tail, draws - 1) / math.sqrt(draws)
        low = min(low, float(lower.mean() - quantile * lower.std(ddof=1)))
        high = max(high, float(upper.mean() + quantile * upper.std(ddof=1)))
    return max(low, 0.0), min(high, 1.0)


def _solve_share(observed: float, dimensions: int, draws: int, level: float) -> float:
    """Return the share p under which a mean share up to `observed` has this probability."""
    from scipy.special import betainc

    # Rounding leaves 1e-16 where the truth is 0 or 1; a space of one dimension gives 1/d.
    if observed <= 1e-13:
        return 0.0
    if observed >= 1 - 1e-13:
        return 1.0
    total = draws * (dimensions + 2) / 2 - 1  # a + b of the Beta; Var = p (1-p) / (total + 1)

    low, high = 0.0, 1.0
    for _ in range(60):  # the probability falls with p
        p = (low + high) / 2
        if betainc(p * total, (1 - p) * total, observed) > level:
            low = p
        else:
            high = p
    return (low + high) / 2


def evaluate_log_kernel(nodes: Array, weights: Array, grid: Array, width: float) -> Array:
    """Return the density per decade of |lambda| on a grid of one sign, (S, G).

    Raises:
        InputError: the grid holds zero or both signs.
    """
    if not ((grid > 0).all() or (grid < 0).all()):
        raise InputError("a grid on a logarithmic scale must be all positive or all negative.")
    signed = nodes * np.sign(grid[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.where(signed > 0, np.log10(signed), -np.inf)
    distance = (np.log10(np.abs(grid)) - decades[..., None]) / width  # (S, m, G)
    kernel = np.exp(-(distance**2) / 2)  # a node of the other sign, or at 0, is infinitely far
    return np.asarray(
        (weights[..., None] * kernel).sum(1) / (width * math.sqrt(2 * math.pi)), dtype=np.float64
    )
