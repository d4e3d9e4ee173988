"""Means of sums with standard errors: clustered jackknife, intervals, ranks. numpy only.

Every estimate here is a smooth function of sums over sequences, so a leave-one-cluster-out
replicate costs one subtraction: total - cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Sums = Mapping[str, Array]


def cluster_sums(values: Array, clusters: NDArray[np.int64]) -> Array:
    """Sum rows that belong to one cluster: (S, ...) -> (C, ...), clusters in sorted order.

    >>> cluster_sums(np.array([1.0, 2.0, 4.0]), np.array([7, 3, 7]))
    array([2., 5.])
    """
    ids, inverse = np.unique(clusters, return_inverse=True)
    sums = np.zeros((len(ids), *values.shape[1:]))
    np.add.at(sums, inverse, values)
    return sums


def jackknife(function: Callable[[Sums], Array], sums: Sums) -> tuple[Array, Array]:
    """Evaluate `function` on total sums, with its leave-one-cluster-out standard error.

    `stderr^2 = (C - 1) / C * sum_c (theta_(c) - mean theta_(.))^2` (Efron and Stein 1981).

    Args:
        function: takes totals of any leading batch shape and returns the statistic of that shape,
            so that all replicates are computed in one call.
        sums: name -> (C, ...) sums of each cluster.

    Returns:
        the statistic and its standard error; with a single cluster the error is infinite, since one
        observation says nothing about its own spread.
    """
    totals = {name: s.sum(0) for name, s in sums.items()}
    estimate = np.asarray(function(totals))
    count = len(next(iter(sums.values())))
    if count < 2:
        return estimate, np.full(estimate.shape, np.inf)
    left_out = {name: totals[name] - s for name, s in sums.items()}
    replicates = np.asarray(function(left_out))
    spread = ((replicates - replicates.mean(0)) ** 2).sum(0)
    return estimate, np.sqrt((count - 1) / count * spread)


def ratio(numerator: Array, denominator: Array, clusters: NDArray[np.int64]) -> tuple[Array, Array]:
    """Return sum(numerator) / sum(denominator) over axis 0 with its jackknife standard error.

    Args:
        numerator: (S, ...) per sequence.
        denominator: (S,) per sequence, counts.
        clusters: (S,) cluster of each sequence.
    """
    sums = {"a": cluster_sums(numerator, clusters), "n": cluster_sums(denominator, clusters)}
    return jackknife(lambda s: s["a"] / _expand(s["n"], s["a"]), sums)


def share(values: Array, clusters: NDArray[np.int64]) -> tuple[float, float]:
    """Return the mean of values that are -1, 0 or 1, one an example, with its standard error.

    Where every example is its own cluster the error is `sqrt((mean v^2 - (mean v)^2) / n)`. Of a
    share a, that is the binomial `sqrt(a (1 - a) / n)`; of the difference of two shares of the same
    examples, `sqrt(b + c - (b - c)^2 / n) / n` with b and c the examples that only one of the two
    counts. Otherwise it is the jackknife's over clusters.

    Args:
        values: (n,) numbers.
        clusters: (n,) cluster of each example; a single cluster says nothing about its spread, so
            its examples are then taken as independent.

    >>> share(np.array([1.0, 1.0, 1.0, 0.0]), np.arange(4))
    (0.75, 0.216...)
    """
    count, groups = len(values), len(np.unique(clusters))
    if 1 < groups < count:
        mean, stderr = ratio(values, np.ones(count), clusters)
        return float(mean), float(stderr)
    mean = values.mean()
    return float(mean), float(np.sqrt(max((values**2).mean() - mean**2, 0.0) / count))


def wilson(part: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score (1927), right also near 0 and 1.

        (a + z^2 / 2n +- z sqrt(a (1 - a) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Args:
        part: the share a that was observed.
        count: n independent observations; a fraction where they are worth fewer.

    >>> [round(end, 4) for end in wilson(1.0, 10)]
    [0.7225, 1.0]
    """
    z = 1.959963984540054  # the normal's 97.5 % quantile
    middle = part + z * z / (2 * count)
    half = z * np.sqrt(part * (1 - part) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    low = 0.0 if part == 0 else float((middle - half) / scale)
    return low, 1.0 if part == 1 else float((middle + half) / scale)


def _expand(small: Array, like: Array) -> Array:
    return small.reshape(small.shape + (1,) * (like.ndim - small.ndim))


def bootstrap_weights(clusters: NDArray[np.int64], generator: np.random.Generator) -> Array:
    """Return one multinomial bootstrap weight a sequence; sequences of a cluster move together."""
    ids, inverse = np.unique(clusters, return_inverse=True)
    counts = np.bincount(generator.integers(0, len(ids), len(ids)), minlength=len(ids))
    return np.asarray(counts[inverse], dtype=np.float64)
