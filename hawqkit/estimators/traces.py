"""The trace and the Frobenius norm of an operator, with errors, to a relative error or a budget.

Letters: n dimensions, m probes, b probes at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray

from hawqkit.curvature.operator import SymmetricOperator, as_operator
from hawqkit.errors import InputError, did_you_mean
from hawqkit.estimators.probes import check_probes, draw_probes, seeded
from hawqkit.estimators.sketches import HutchPlusPlus, XTrace
from hawqkit.estimators.vectors import inner_rows, multiply, working_dtype
from hawqkit.records.spectral import Estimate, mean_estimate

METHODS = ("hutchinson", "hutch++", "xtrace")

# A run that stops where its standard error has come down stops more often where that error is too
# small by chance: its 95 % intervals held the truth in 90 to 93 % of the cases. Standard errors of
# such runs are therefore raised by 4/m, and none stops before 24 samples: 94 to 96 %.
FEWEST_SAMPLES = 24
CAUTION = 4.0
# Where only a relative error is asked, a trace near zero would never reach it.
MOST_PRODUCTS = 10_000
DEFAULT_ERROR = 0.05

Source = SymmetricOperator | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]


def trace(
    source: Source,
    *,
    relative_error: float | None = None,
    products: int | None = None,
    method: str = "hutchinson",
    probes: str | None = None,
    confidence: float = 0.95,
    batch: int = 8,
    seed: int = 0,
) -> Estimate:
    """Estimate tr A.

    - `hutchinson` (1989): mean of `v' A v`; the interval is Student's t.
    - `hutch++` (Meyer, Musco, Musco and Woodruff 2021): exact on a sketch of the range, Hutchinson
      on the rest. A third of the products each for sketch, range and rest.
    - `xtrace` (Epperly, Tropp and Webber 2024): every probe serves as sketch for all the others.

    The last two win where few eigenvalues carry the trace, and hold vectors in memory for all their
    products. Their `stderr` is an error estimate: it comes without an interval, and
    docs/estimators.md says how often it holds.

    It stops when the standard error is below `relative_error` of the estimate, or when the budget
    is spent, whichever is first; never because the mean stood still. Where `relative_error` was not
    reached the note says so. Where it is asked, standard errors are raised by 4/m: the rule picks
    runs whose error looks small by chance.

    Args:
        source: an operator or a dense matrix.
        relative_error: standard error / |trace| to reach; 0.05 if `products` is not set either.
        products: budget of operator-vector products; without one, 10,000.
        method: `hutchinson`, `hutch++` or `xtrace`.
        probes: `rademacher`, `gaussian` or `spherical`; None takes what suits the method: spherical
            for XTrace, whose estimates are normalized on the sphere, Rademacher for the others.
        confidence: of the interval.
        batch: probes that are multiplied together: memory for 2 x batch vectors.
        seed: of the probes.

    Raises:
        InputError: an unknown method or kind of probe, or a budget too small for a standard error.

    >>> trace(torch.diag(torch.arange(5.0)), products=4).value
    10.0
    """
    operator = as_operator(source)
    if method not in METHODS:
        raise InputError(
            f"method: {method!r} is unknown; there are {', '.join(METHODS)}."
            + did_you_mean(method, METHODS)
        )
    kind = probes or ("spherical" if method == "xtrace" else "rademacher")
    rule = _Stopping.of(relative_error, products, {"xtrace": 4, "hutch++": 6}.get(method, 2))
    if method == "hutchinson":
        run = _hutchinson(operator, rule, kind, confidence, batch, seed, quantity="trace")
        return run.trace(confidence)
    check_probes(kind)
    generator = seeded(seed)
    sketch: XTrace | HutchPlusPlus
    sketch = (XTrace if method == "xtrace" else HutchPlusPlus)(operator, kind, generator)
    return _run_sketch(sketch, rule, batch, confidence)


def frobenius_norm(
    source: Source,
    *,
    relative_error: float | None = None,
    products: int | None = None,
    probes: str = "rademacher",
    confidence: float = 0.95,
    batch: int = 8,
    seed: int = 0,
) -> Estimate:
    """Estimate |A|_F, the root of the mean of |A v|^2; see `trace` for the arguments.

    The interval is the root of the t interval of the squared norm. The root of an unbiased estimate
    is biased low, by about stderr^2 / (2 value).

    >>> frobenius_norm(torch.diag(torch.tensor([3.0, 4.0])), products=4).value
    5.0
    """
    rule = _Stopping.of(relative_error, products, 2)
    operator = as_operator(source)
    run = _hutchinson(operator, rule, probes, confidence, batch, seed, quantity="norm")
    return run.norm(confidence)


def trace_and_norm(
    source: Source,
    *,
    relative_error: float | None = None,
    products: int | None = None,
    probes: str = "rademacher",
    confidence: float = 0.95,
    batch: int = 8,
    seed: int = 0,
) -> tuple[Estimate, Estimate]:
    """Estimate tr A by Hutchinson and |A|_F from the same products; the trace decides when to stop.

    See `trace` and `frobenius_norm`.
    """
    rule = _Stopping.of(relative_error, products, 2)
    operator = as_operator(source)
    run = _hutchinson(operator, rule, probes, confidence, batch, seed, quantity="trace")
    return run.trace(confidence), run.norm(confidence)


@dataclass(frozen=True)
class _Stopping:
    """When an estimate is good enough, and how many products it may cost."""

    relative_error: float | None
    products: int

    @staticmethod
    def of(relative_error: float | None, products: int | None, fewest: int) -> _Stopping:
        if relative_error is None and products is None:
            relative_error = DEFAULT_ERROR
        if relative_error is not None and not relative_error > 0:
            raise InputError(f"relative_error: must be a positive number; got {relative_error}.")
        if products is not None and products < fewest:
            raise InputError(
                f"products: {products} are too few for a standard error; give {fewest} or more."
            )
        return _Stopping(relative_error, MOST_PRODUCTS if products is None else products)

    def raised(self, estimate: Estimate) -> Estimate:
        """Return the estimate with the standard error of a run that stops by it."""
        if self.relative_error is None:
            return estimate
        factor, interval = 1 + CAUTION / max(estimate.samples, 1), estimate.interval
        if interval is not None:
            low, high = (estimate.value + factor * (end - estimate.value) for end in interval)
            interval = low, high
        return replace(estimate, stderr=factor * estimate.stderr, interval=interval)

    def reached(self, estimate: Estimate) -> bool:
        return self.relative_error is not None and estimate.relative_error <= self.relative_error

    def unmet(self, estimate: Estimate) -> str:
        if self.relative_error is None or self.reached(estimate):
            return ""
        return (
            f"relative error {estimate.relative_error:.3g} after {estimate.products} products; "
            f"{self.relative_error:g} was asked"
        )


@dataclass
class _Hutchinson:
    """Samples of v' A v and |A v|^2."""

    rule: _Stopping
    quadratic: list[float] = field(default_factory=list)
    squared: list[float] = field(default_factory=list)

    def trace(self, confidence: float, *, noted: bool = True) -> Estimate:
        plain = mean_estimate(
            self.quadratic,
            products=len(self.quadratic),
            method="hutchinson",
            confidence=confidence,
        )
        plain = self.rule.raised(plain)
        return _noted(plain, self.rule.unmet(plain)) if noted else plain

    def norm(self, confidence: float, *, noted: bool = True) -> Estimate:
        square = mean_estimate(
            self.squared, products=len(self.squared), method="hutchinson", confidence=confidence
        )
        value = math.sqrt(square.value)
        low, high = square.interval or (0.0, 0.0)
        estimate = Estimate(
            value,
            square.stderr / (2 * value) if value else 0.0,
            square.samples,
            square.products,
            square.method,
            (math.sqrt(max(low, 0.0)), math.sqrt(high)),
            confidence=confidence,
        )
        estimate = self.rule.raised(estimate)
        return _noted(estimate, self.rule.unmet(estimate)) if noted else estimate


def _noted(estimate: Estimate, note: str) -> Estimate:
    return replace(estimate, note=note) if note else estimate


def _hutchinson(
    operator: SymmetricOperator,
    rule: _Stopping,
    kind: str,
    confidence: float,
    batch: int,
    seed: int,
    *,
    quantity: str,
) -> _Hutchinson:
    check_probes(kind)
    if batch < 1:
        raise InputError(f"batch: must be at least 1; got {batch}.")
    generator, run = seeded(seed), _Hutchinson(rule)
    while len(run.quadratic) < rule.products:
        count = min(batch, rule.products - len(run.quadratic))
        V = draw_probes(
            operator.size,
            count,
            kind,
            generator,
            device=operator.device,
            dtype=working_dtype(operator),
        )  # (b, n)
        AV = multiply(operator, V)
        run.quadratic += inner_rows(V, AV).tolist()
        run.squared += inner_rows(AV, AV).tolist()
        if len(run.quadratic) < min(FEWEST_SAMPLES, rule.products):
            continue
        estimate = run.trace if quantity == "trace" else run.norm
        if rule.reached(estimate(confidence, noted=False)):
            break
    return run


def _run_sketch(
    sketch: XTrace | HutchPlusPlus, rule: _Stopping, batch: int, confidence: float
) -> Estimate:
    if batch < 1:
        raise InputError(f"batch: must be at least 1; got {batch}.")
    estimate: Estimate | None = None
    while True:
        count = min(batch, (rule.products - sketch.products) // sketch.price)
        if count < 1 or sketch.exhausted:
            break
        sketch.extend(count)
        if sketch.samples >= 2 or sketch.exhausted:
            values, known = sketch.estimates()
            estimate = rule.raised(_sketch_estimate(values, known, sketch, confidence))
            enough = sketch.samples >= min(FEWEST_SAMPLES, rule.products // sketch.price)
            if enough and rule.reached(estimate):
                break
    if estimate is None:  # the budget holds two samples at least, so this cannot be
        raise InputError("products: too few for a standard error.")
    return _noted(estimate, "; ".join(filter(None, (estimate.note, rule.unmet(estimate)))))


def _sketch_estimate(
    values: NDArray[np.float64],
    known: bool,
    sketch: XTrace | HutchPlusPlus,
    confidence: float,
) -> Estimate:
    if known:
        return Estimate(
            float(values.mean()),
            0.0,
            len(values),
            sketch.products,
            sketch.name,
            note="the sketch holds the whole range: exact but for rounding",
            confidence=confidence,
        )
    stderr = float(values.std(ddof=1)) / math.sqrt(len(values))
    return Estimate(
        float(values.mean()),
        stderr,
        len(values),
        sketch.products,
        sketch.name,
        note="stderr is an error estimate",
        confidence=confidence,
    )
