"""Scores: from raw sums of the probe to a predicted loss in nats, for each layer and format.

Each score is a function of sums over sequences, so its standard error is a clustered jackknife of
the whole formula (see `statistics.jackknife`). All of them predict the mean KL divergence from the
original model in nats; they differ in what they know about the rounding error dW.

Where a format rounds the layer's inputs too, each score has a second part, made of the error da of
the input and of the gradient g_a there; rounding errors of weights and inputs are taken as
independent but by `directional`, which needs no such assumption. docs/activations.md has them all.

Letters: L layers, F formats, C clusters; `...` any leading shape (jackknife replicates).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hawqkit.errors import InputError, did_you_mean
from hawqkit.records import Floats, Integers, Samples
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES, HESSIAN_TRACE
from hawqkit.statistics import Sums, cluster_sums, jackknife

# Weight of the token score in the geometric mean `shrunk`, and the best score: docs/scores.md has
# the comparison that decided both.
SHRINKAGE = 0.75
AUTO = "token"
ISOTROPIC = ("trace", "weight-error", HESSIAN_TRACE)  # they take dW as random


def _per_numel(s: Sums, facts: Facts) -> Floats:
    traces: Floats = s["squared_gradient"] / s["count"][..., None]
    return traces / facts.numel


def _inputs(s: Sums, name: str) -> Floats | float:
    """Return `1/2 sum / n` of a sum over inputs, 0 where no format rounds them."""
    if name not in s:
        return 0.0
    part: Floats = 0.5 * s[name] / s["count"][..., None, None]
    return part


def trace(s: Sums, facts: Facts) -> Floats:
    """HAWQ-V2 (Dong et al. 2020): `1/2 tr(G_l) / n_l |dW|^2`. The direction of dW is not used.

    With rounded inputs `+ 1/2 sum_s tr(G_as) / n_as |da_s|^2`, G_as the block of example s's input
    and n_as its entries: that matrix is block diagonal over examples.
    """
    weights: Floats = 0.5 * _per_numel(s, facts)[..., None] * facts.weight_error
    return weights + _inputs(s, "input_isotropic")


def directional(s: Sums, facts: Facts) -> Floats:
    """`1/2 dW' G_l dW` with the rounding error that the format really makes.

    With rounded inputs `1/2 u' G_yl u`, u = dW (a + da) + W da the whole error of the layer's
    output and G_yl the matrix of that output.
    """
    return 0.5 * s["directional_squared"] / s["count"][..., None, None]


def token(s: Sums, facts: Facts) -> Floats:
    """Trace-matched token score, outputs squared one by one.

    `1/2 tr(G_l) * sum_t sum_o (d_to (dW a_t)_o)^2 / sum_t |d_t|^2 |a_t|^2`

    With rounded inputs, a_t + da_t stands for the a_t of the numerator, and `1/2 (g_a . da)^2` of
    whole examples is added. Sums over single tokens would be quieter and wrong: equal inputs have
    equal errors, as in the background of an image, and these add up (docs/activations.md).
    """
    return _matched(s, "token") + _inputs(s, "input_squared")


def token_summed(s: Sums, facts: Facts) -> Floats:
    """Trace-matched token score, outputs summed first: `(d_t . dW a_t)^2` in the numerator.

    With rounded inputs, the same is added as to `token`.
    """
    return _matched(s, "token_summed") + _inputs(s, "input_squared")


def shrunk(s: Sums, facts: Facts) -> Floats:
    """`trace^(1 - b) * token^b`, b = 0.75.

    The trace knows one number a layer and carries over to other text; the token score knows the
    direction of the error but fits its noise and its text. With a few sequences their geometric
    mean chooses as well as either or better, with many the token score alone does (docs/scores.md).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        mean: Floats = trace(s, facts) ** (1 - SHRINKAGE) * token(s, facts) ** SHRINKAGE
    return mean


def weight_error(s: Sums, facts: Facts) -> Floats:
    """`|dW|^2` with one curvature for the whole network: `1/2 sum_l tr(G_l) / sum_l n_l |dW|^2`.

    With rounded inputs `|da|^2` is added, with one curvature of all entries of all inputs.
    """
    mean: Floats = s["squared_gradient"].sum(-1) / s["count"] / facts.numel.sum()
    weights: Floats = 0.5 * mean[..., None, None] * facts.weight_error
    if "input_error" not in s:
        return weights
    entries = s["input_count"].sum(-1)
    curvature = s["input_squares"].sum(-1) / np.maximum(entries, 1.0)  # 0 where nothing is rounded
    inputs: Floats = curvature[..., None, None] * _inputs(s, "input_error")
    return weights + inputs


def _matched(s: Sums, name: str) -> Floats:
    traces = s["squared_gradient"] / s["count"][..., None]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = s[name] / s["token_norm"][..., None]
    # A layer whose gradient is exactly zero has no direction: its loss is zero, not 0/0.
    return 0.5 * traces[..., None] * np.where(s["token_norm"][..., None] > 0, share, 0 * s[name])


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not depend on the samples: numel (L,) and |dW|^2 (L, F), NaN where none is."""

    numel: Floats
    weight_error: Floats


SCORES: dict[str, Callable[[Sums, Facts], Floats]] = {
    "trace": trace,
    "token": token,
    "token-summed": token_summed,
    "directional": directional,
    "shrunk": shrunk,
    "weight-error": weight_error,
}


def score_names() -> tuple[str, ...]:
    """Return every name that a recipe may ask for."""
    return ("auto", *SCORES, *CURVATURE_SCORES)


def resolve_score(name: str, auto: str = AUTO) -> str:
    """Return the score that a name stands for.

    Raises:
        InputError: there is none of that name.
    """
    if name == "auto":
        return auto
    if name not in score_names():
        raise InputError(
            f"unknown score {name!r}: known are {', '.join(score_names())}."
            + did_you_mean(name, score_names())
        )
    return name


def sums_of(samples: Samples, rows: Integers | None = None, weights: Floats | None = None) -> Sums:
    """Return the sums of each cluster that every score is a function of: name -> (C, ...).

    Args:
        samples: of the probe.
        rows: the sequences to use, default all that choose (not withheld).
        weights: (S,) multiplicity of each row, for a bootstrap.
    """
    rows = np.flatnonzero(samples.withheld == 0) if rows is None else rows
    w = np.ones(len(rows)) if weights is None else weights
    clusters = samples.document[rows]

    def total(values: Floats) -> Floats:
        return cluster_sums(values * w.reshape(-1, *[1] * (values.ndim - 1)), clusters)

    sums = {
        "count": total(samples.count[rows].astype(np.float64)),
        "squared_gradient": total(samples.squared_gradient[rows]),
        "directional_squared": total(samples.directional[rows] ** 2),
        "token_norm": total(samples.token_norm[rows]),
        "token": total(samples.token[rows]),
        "token_summed": total(samples.token_summed[rows]),
    }
    return sums | {name: total(values[rows]) for name, values in _of_inputs(samples).items()}


def _of_inputs(samples: Samples) -> dict[str, Floats]:
    """Return what scores need of the inputs by sequence, nothing where none is rounded."""
    squares, entries, error = samples.input_squares, samples.input_count, samples.input_error
    linear = samples.input_linear
    if squares is None or entries is None or error is None or linear is None:
        return {}
    per_entry = squares / np.maximum(entries, 1.0)  # (S, L)
    return {
        "input_squares": squares,
        "input_count": entries,
        "input_error": error,
        "input_isotropic": per_entry[..., None] * error,
        "input_squared": linear**2,
    }


def evaluate(name: str, sums: Sums, facts: Facts) -> tuple[Floats, Floats]:
    """Return a score (L, F) and its jackknife standard error (L, F)."""
    return jackknife(lambda s: SCORES[name](s, facts), sums)


def evaluate_totals(name: str, sums: Sums, facts: Facts) -> Floats:
    """Return a score (L, F) alone; fast, for resampling."""
    return SCORES[name]({k: v.sum(0) for k, v in sums.items()}, facts)


def with_risk(
    name: str,
    values: Floats,
    stderr: Floats,
    participation: Floats,
    risk: float,
    deviation: Floats | None = None,
) -> Floats:
    """Add `risk` standard deviations to a score (L, F).

    For scores that take dW as random (`trace`, `weight-error`, `hessian-trace`) the deviation of
    `dW' G dW` about its mean is `sqrt(2 / participation ratio)`, relative: a layer of low effective
    rank is a risky bet at the same trace. A score may bring a deviation of its own, as
    `top-eigenvalue` does, over shards of the text. For the others, which know dW, it is their own
    standard error.

    Raises:
        InputError: `risk` is positive and a deviation is not known.
    """
    if risk == 0:
        return values
    isotropic = name in ISOTROPIC
    what = "participation ratio" if isotropic else "standard error"
    advice = "calibrate on more of them, in micro-batches of at least two, or use risk 0."
    if isotropic:
        deviation = values * np.sqrt(2 / participation)[:, None]
    elif deviation is not None:
        what = "deviation over shards of the data"
        advice = "set sensitivity.curvature.shards to 2 or more, or use risk 0."
    else:
        deviation = stderr
    if not np.isfinite(deviation[np.isfinite(values)]).all():
        raise InputError(
            f"risk {risk:g} needs the {what} of every layer, and this run measured too little "
            f"data for it; {advice}"
        )
    return values + risk * deviation
