"""What is estimated of a symmetric operator, each number with its error and its cost. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that was measured, how far off it may be, and what it cost.

    Attributes:
        value: the estimate.
        stderr: its standard error; 0 where the number was computed and not sampled.
        samples: independent draws behind it, 0 where it was computed.
        products: operator-vector products that were spent.
        method: how it was got, `hutchinson`, `xtrace`, `lanczos quadrature`, `dense`.
        interval: where the truth lies with probability `confidence`; None where `stderr` is only an
            error estimate, whose coverage was measured and not derived.
        note: what a reader must know: a stopping rule that was not met, a bias.
        confidence: of `interval`.
    """

    value: float
    stderr: float
    samples: int
    products: int
    method: str
    interval: tuple[float, float] | None = None
    note: str = ""
    confidence: float = 0.95

    @property
    def relative_error(self) -> float:
        """Return stderr / |value|; infinite for a zero that is not exact."""
        if self.value == 0:
            return math.inf if self.stderr > 0 else 0.0
        return self.stderr / abs(self.value)

    @property
    def count(self) -> int:
        """The value as a whole number, for ranks and other counts."""
        return round(self.value)

    def covers(self, truth: float) -> bool:
        """Say whether the interval holds a number.

        >>> Estimate(2.0, 0.5, 9, 9, "hutchinson", (1.0, 3.0)).covers(2.5)
        True
        """
        return self.interval is not None and self.interval[0] <= truth <= self.interval[1]

    def scaled(self, factor: float) -> Estimate:
        """Return the estimate of `factor` times the number.

        >>> Estimate(2.0, 0.5, 9, 9, "hutchinson", (1.0, 3.0)).scaled(-2).interval
        (-6.0, -2.0)
        """
        interval = self.interval
        if interval is not None:
            low, high = sorted((factor * interval[0], factor * interval[1]))
            interval = (low, high)
        return replace(
            self, value=factor * self.value, stderr=abs(factor) * self.stderr, interval=interval
        )


def exact_estimate(value: float, *, products: int, method: str) -> Estimate:
    """Return an Estimate of a number that was computed, not sampled."""
    return Estimate(value, 0.0, 0, products, method, (value, value))


def mean_estimate(
    samples: Sequence[float] | NDArray[np.float64],
    *,
    products: int,
    method: str,
    confidence: float = 0.95,
    note: str = "",
) -> Estimate:
    """Return the mean of independent samples with Student's t interval.

    Formula: `mean +- t_{m-1} s / sqrt(m)`.

    Args:
        samples: (m,), m >= 2.
        products: what they cost.
        method: how they were got.
        confidence: of the interval.
        note: carried along.

    >>> mean_estimate([1.0, 3.0], products=2, method="hutchinson").value
    2.0
    """
    x = np.asarray(samples, dtype=np.float64)
    value, stderr = float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x)))
    return Estimate(
        value,
        stderr,
        len(x),
        products,
        method,
        student_interval(value, stderr, len(x), confidence),
        note,
        confidence,
    )


def student_interval(
    value: float, stderr: float, samples: int, confidence: float
) -> tuple[float, float]:
    """Return value +- t stderr, t the two-sided quantile with samples - 1 degrees of freedom."""
    half = student_quantile((1 + confidence) / 2, samples - 1) * stderr if stderr > 0 else 0.0
    return value - half, value + half


def student_quantile(level: float, degrees: int) -> float:
    """Return the quantile of Student's t.

    >>> round(student_quantile(0.975, 9), 3)
    2.262
    """
    from scipy.special import stdtrit  # scipy.stats.t.ppf, without its second to import

    return float(stdtrit(degrees, level))


@dataclass(frozen=True, slots=True)
class Eigenvalues:
    """Eigenvalues without their vectors, for a record.

    Attributes:
        values: in the order that was asked for.
        residuals: bounds of |A v - theta v| for unit v; an eigenvalue lies within each.
        converged: whether the residual is below the tolerance.
        size: n.
        products: that were spent.
        tolerance: on residual / largest |theta|.
        largest: which were asked for: `magnitude`, `algebraic`, `smallest`, `both`.
        note: what a reader must know.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    converged: tuple[bool, ...]
    size: int
    products: int
    tolerance: float
    largest: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The numerical rank over a grid of thresholds: r_eps = #{|lambda| >= eps}.

    Attributes:
        asked: thresholds as they were asked for, absolute.
        eps: thresholds that were used: never below `noise_floor`.
        counts: r_eps, one Estimate a threshold.
        degeneracy: 1 - r_eps / n.
        negative: #{lambda <= -eps}: directions of negative curvature.
        size: n.
        noise_floor: eigenvalues below it cannot be told from zero.
        largest: largest |lambda| found.
        method: `dense` or `lanczos quadrature`.
        products: that were spent.
        note: what a reader must know, such as a threshold that was lifted.
    """

    asked: tuple[float, ...]
    eps: tuple[float, ...]
    counts: tuple[Estimate, ...]
    degeneracy: tuple[Estimate, ...]
    negative: tuple[Estimate, ...]
    size: int
    noise_floor: float
    largest: float
    method: str
    products: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class RankStatistics:
    """Four numbers that are all called effective rank, each by its own name.

    For a positive semidefinite matrix they rise in this order, up to the rank:
    `stable <= trace_ratio <= participation <= entropy <= rank`.

    Attributes:
        stable: |A|_F^2 / |A|_2^2.
        trace_ratio: tr A / lambda_1, with lambda_1 the largest |lambda|.
        participation: (tr A)^2 / |A|_F^2.
        entropy: exp(-sum p ln p), p = |lambda| / sum |lambda|.
        trace: tr A.
        frobenius: |A|_F.
        largest: the eigenvalue of largest magnitude.
        size: n.
        products: that were spent.
        note: what a reader must know.
    """

    stable: Estimate
    trace_ratio: Estimate
    participation: Estimate
    entropy: Estimate
    trace: Estimate
    frobenius: Estimate
    largest: float
    size: int
    products: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """A power law lambda_k = lambda_1 k^-s fitted to the largest eigenvalues, and its verdict.

    Attributes:
        exponent: s.
        stderr: of s.
        distance: Kolmogorov-Smirnov distance between the eigenvalues and the law.
        threshold: 1.36 / sqrt(K), above which the law is refused.
        accepted: distance < threshold.
        K: eigenvalues that were used.
        smallest: the least of them.
        note: what a reader must know.
    """

    exponent: float
    stderr: float
    distance: float
    threshold: float
    accepted: bool
    K: int
    smallest: float
    note: str = ""
