"""What a measured spectrum says about rank: counts, four effective ranks, a power law. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from hawqkit.errors import InputError
from hawqkit.records.density import Density
from hawqkit.records.spectral import (
    Estimate,
    PowerLaw,
    Ranks,
    RankStatistics,
    exact_estimate,
    student_interval,
)
from hawqkit.statistics import Sums, jackknife

Array = NDArray[np.float64]

# Kolmogorov's 5 % point, over sqrt(K); the test of Xie et al. 2022, section 2.
KOLMOGOROV = 1.36
FEWEST_EIGENVALUES = 10
USUAL_EIGENVALUES = 1000  # K of Xie et al. 2022


def ranks_of(
    spectrum: Density,
    eps: float | Sequence[float],
    *,
    noise_floor: float,
    relative: bool = False,
    confidence: float = 0.95,
) -> Ranks:
    """Return the numerical rank and the degeneracy of a measured spectrum, for each threshold.

    A threshold below the noise floor is lifted to it: `Ranks.eps` and the note say so.

    Args:
        spectrum: of `deflated_density` or `density`.
        eps: one or several thresholds of |lambda|.
        noise_floor: of the operator's products.
        relative: thresholds are shares of the largest |lambda|.
        confidence: of the intervals.

    Raises:
        InputError: no threshold, or one that is not positive.
    """
    given = [float(e) for e in np.atleast_1d(np.asarray(eps, dtype=np.float64))]
    if not given or not all(e > 0 and math.isfinite(e) for e in given):
        raise InputError(f"eps: thresholds must be positive numbers; got {given}.")
    largest = spectrum.largest
    asked = [e * largest for e in given] if relative else given
    # In a spectrum of zeros a relative threshold would be zero too; any positive one counts them.
    tiny = float(np.finfo(np.float64).tiny)
    used = [max(e, noise_floor, tiny) for e in asked]
    counts = tuple(spectrum.count_above(e, confidence=confidence) for e in used)
    lifted = sum(e < noise_floor for e in asked)
    notes = [spectrum.note] if spectrum.note else []
    if lifted:
        notes.append(f"{lifted} of {len(asked)} thresholds were lifted to the noise floor")
    return Ranks(
        asked=tuple(asked),
        eps=tuple(used),
        counts=counts,
        degeneracy=tuple(_degeneracy(count, spectrum.size) for count in counts),
        negative=tuple(spectrum.count_negative(e, confidence=confidence) for e in used),
        size=spectrum.size,
        noise_floor=noise_floor,
        largest=largest,
        method=spectrum.method,
        products=spectrum.products,
        note="; ".join(notes),
    )


def _degeneracy(count: Estimate, size: int) -> Estimate:
    share = count.scaled(-1 / size)
    low, high = share.interval or (0.0, 0.0)
    return replace(share, value=1 + share.value, interval=(1 + low, 1 + high))


def statistics_of(spectrum: Density, *, confidence: float = 0.95) -> RankStatistics:
    """Return stable rank, tr/lambda_1, participation ratio and entropy rank of a measured spectrum.

    Errors are those of the jackknife over draws, which knows that numerator and denominator come
    from the same draws; lambda_1 is taken as known.

    Args:
        spectrum: of `deflated_density`, whose known eigenvalues hold lambda_1.
        confidence: of the intervals.

    Raises:
        InputError: there is one draw alone.
    """
    if spectrum.draws == 1:
        raise InputError("rank statistics: one draw gives no error bar; take two or more.")
    candidates = spectrum.known if len(spectrum.known) else spectrum.nodes_and_weights()[0].ravel()
    top = float(candidates[np.abs(candidates).argmax()])
    size = abs(top)
    sums: dict[str, Array] = {
        "trace": spectrum.draws_of(lambda x: x),
        "square": spectrum.draws_of(lambda x: x**2),
        "absolute": spectrum.draws_of(np.abs),
        "logarithm": spectrum.draws_of(_x_log_x),
    }
    if not spectrum.draws:
        sums = {
            "trace": spectrum.known.sum(keepdims=True),
            "square": (spectrum.known**2).sum(keepdims=True),
            "absolute": np.abs(spectrum.known).sum(keepdims=True),
            "logarithm": _x_log_x(spectrum.known).sum(keepdims=True),
        }
    sums["draws"] = np.ones(len(sums["trace"]))
    notes = [spectrum.note] if spectrum.note else []
    if not len(spectrum.known):
        notes.append("lambda_1 is the largest node of the draws, a lower bound")
    if size == 0:
        notes.append("the operator is zero")

    def estimate(function: Callable[[Sums], Array]) -> Estimate:
        return _estimate(function, sums, spectrum, confidence)

    def mean(s: Sums, name: str) -> Array:
        return np.asarray(s[name] / s["draws"])

    return RankStatistics(
        stable=estimate(lambda s: _divide(mean(s, "square"), size**2)),
        trace_ratio=estimate(lambda s: _divide(mean(s, "trace"), size)),
        participation=estimate(lambda s: _divide(mean(s, "trace") ** 2, mean(s, "square"))),
        entropy=estimate(lambda s: _entropy(mean(s, "absolute"), mean(s, "logarithm"))),
        trace=estimate(lambda s: mean(s, "trace")),
        frobenius=estimate(lambda s: np.sqrt(mean(s, "square"))),
        largest=top,
        size=spectrum.size,
        products=spectrum.products,
        note="; ".join(notes),
    )


def _x_log_x(x: Array) -> Array:
    absolute = np.abs(x)
    return np.asarray(absolute * np.log(np.where(absolute > 0, absolute, 1.0)))


def _divide(numerator: Array, denominator: Array | float) -> Array:
    """Return the ratio, 0 / 0 being 0: a zero operator has rank 0."""
    denominator = np.asarray(denominator)
    safe = np.where(denominator == 0, 1.0, denominator)
    return np.asarray(np.where(denominator == 0, 0.0, numerator / safe))


def _entropy(absolute: Array, logarithm: Array) -> Array:
    """Return exp(-sum p ln p) from Z = sum |lambda| and sum |lambda| ln |lambda|."""
    safe = np.where(absolute > 0, absolute, 1.0)
    return np.asarray(np.where(absolute > 0, safe * np.exp(-logarithm / safe), 0.0))


def _estimate(
    function: Callable[[Sums], Array], sums: Sums, spectrum: Density, confidence: float
) -> Estimate:
    if not spectrum.draws:
        value = float(function({name: s[0] for name, s in sums.items()}))
        return exact_estimate(value, products=spectrum.products, method=spectrum.method)
    value, stderr = (float(x) for x in jackknife(function, sums))
    return Estimate(
        value,
        stderr,
        spectrum.draws,
        spectrum.products,
        spectrum.method,
        student_interval(value, stderr, spectrum.draws, confidence),
        confidence=confidence,
    )


def power_law_of(spectrum: Density) -> PowerLaw | None:
    """Return the law of a measured spectrum's largest known eigenvalues, at most 1,000 of them.

    Nodes of the quadrature are no eigenvalues and don't enter. None where fewer than ten positive
    eigenvalues above rounding are known, or they are all equal.

    Args:
        spectrum: of `deflated_density`.
    """
    x = np.sort(spectrum.known[spectrum.known > 0])[::-1]
    if len(x):
        x = x[x > len(x) * np.finfo(np.float64).eps * x[0]]  # what a dense solver makes of zeros
    x = x[:USUAL_EIGENVALUES]
    if len(x) < FEWEST_EIGENVALUES or x[0] == x[-1]:
        return None
    return power_law(x)


def power_law(values: Sequence[float] | Array, K: int | None = None) -> PowerLaw:
    """Fit lambda_k = lambda_1 k^-s to the K largest eigenvalues and test the fit.

    Eigenvalues that fall as k^-s have the density `lambda^-b` with `b = 1 + 1/s`; maximum
    likelihood gives `b = 1 + K / sum ln(lambda_i / lambda_K)` (Clauset, Shalizi and Newman 2009,
    eq. 3.1), and the Kolmogorov-Smirnov distance d between the eigenvalues and that law is accepted
    below `1.36 / sqrt(K)` (Xie et al. 2022, with K about 1,000). That threshold is for a law known
    beforehand; a fitted one is nearer to its own data, so the test accepts more than 95 % of
    true power laws and is lenient with others.

    Args:
        values: eigenvalues; the positive ones are used.
        K: how many of the largest; None takes all positive ones.

    Raises:
        InputError: fewer than ten positive eigenvalues, or all are equal.

    >>> law = power_law(1 / np.arange(1.0, 1001.0) ** 1.5)
    >>> round(law.exponent, 1), law.accepted
    (1.5, True)
    """
    x = np.sort(np.asarray(values, dtype=np.float64).ravel())[::-1]
    x = x[x > 0]
    positive = len(x)
    if K is not None and not FEWEST_EIGENVALUES <= K <= positive:
        raise InputError(
            f"K: {K} eigenvalues were asked of {positive} positive ones; "
            f"give {FEWEST_EIGENVALUES} to {positive}."
        )
    if positive < FEWEST_EIGENVALUES:
        raise InputError(
            f"power_law: {positive} positive eigenvalues say nothing about a law; "
            f"give {FEWEST_EIGENVALUES} or more."
        )
    x = x[:K]
    logs = np.log(x / x[-1])
    if not logs.sum() > 0:
        raise InputError("power_law: all eigenvalues are equal; a power law needs a fall.")
    count = len(x)
    exponent = float(logs.sum()) / count  # s = 1 / (b - 1)
    rising = logs[::-1]
    law = 1 - np.exp(-rising / exponent)  # F(lambda) = 1 - (lambda / lambda_K)^(1 - b)
    steps = np.arange(count + 1) / count
    distance = float(max((steps[1:] - law).max(), (law - steps[:-1]).max()))
    threshold = KOLMOGOROV / math.sqrt(count)
    return PowerLaw(
        exponent,
        exponent / math.sqrt(count),
        distance,
        threshold,
        distance < threshold,
        count,
        float(x[-1]),
        "" if count >= 100 else f"{count} eigenvalues refuse little; about 1,000 are usual",
    )
