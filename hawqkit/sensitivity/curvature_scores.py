"""Scores from the true curvature: what a layer's measured Hessian predicts for each format.

No torch here, so that a saved table can be chosen from without it.

Letters: D shards of the text, L layers, F formats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hawqkit.formats import parse_format, with_activations
from hawqkit.records import Curvature, Floats, Score, Sensitivities, to_array, to_table
from hawqkit.statistics import jackknife

HESSIAN_TRACE, TOP_EIGENVALUE = "hessian-trace", "top-eigenvalue"
CURVATURE_SCORES = (HESSIAN_TRACE, TOP_EIGENVALUE)

NAMED = 3  # layers that a warning names


@dataclass(frozen=True, slots=True)
class Predicted:
    """A score with what is known of its spread, (L, F) each; NaN where it is not known.

    Attributes:
        values: predicted loss in nats.
        stderr: standard error of the values.
        deviation: what one standard deviation of risk adds, None where `with_risk` knows it.
    """

    values: Floats
    stderr: Floats
    deviation: Floats | None = None


def measured_scores(curvature: Curvature) -> tuple[str, ...]:
    """Return the scores that a measurement allows."""
    held = {HESSIAN_TRACE: curvature.traces, TOP_EIGENVALUE: curvature.eigenvalues}
    return tuple(name for name in CURVATURE_SCORES if held[name])


def evaluate_curvature(
    name: str, curvature: Curvature, numel: Floats, weight_error: Floats
) -> Predicted:
    """Return a score of every layer and format with its errors.

    `hessian-trace` is HAWQ-V2 (Dong et al. 2020) with the Hessian itself, `1/2 tr(H_l) / numel
    |dW|^2`: the expected loss if dW has no direction of its own. An estimate below zero, which no
    predicted loss can be, counts as zero. Its standard error is that over shards, which holds the
    probes' too, and never less than the probes'; with a single shard it is the probes'.

    `top-eigenvalue` is HAWQ (Dong et al. 2019), `1/2 |lambda| |dW|^2` with lambda the mean over
    shards of the eigenvalue of largest magnitude: the loss if dW lay along its eigenvector, so the
    worst case. The deviation is the standard deviation over shards: `risk: 1` adds it once and so
    gives Q-BERT's `|mean| + std` (Shen et al. 2020). A single shard has neither error nor
    deviation.

    Args:
        name: one of `CURVATURE_SCORES`.
        curvature: what was measured.
        numel: (L,) entries of each layer.
        weight_error: (L, F) |dW|^2.
    """
    if name == HESSIAN_TRACE:
        value, stderr = layer_traces_of(curvature)
        values = _of(np.maximum(value, 0.0) / numel, weight_error)
        return Predicted(values, _of(stderr / numel, weight_error))
    mean, deviation = layer_eigenvalues_of(curvature)
    return Predicted(
        _of(np.abs(mean), weight_error),
        _of(deviation / np.sqrt(len(curvature.counts)), weight_error),
        _of(deviation, weight_error),
    )


def resampled_curvature(
    name: str, curvature: Curvature, numel: Floats, weight_error: Floats, weights: Floats
) -> Floats:
    """Return a score (L, F) alone, from shards that are taken `weights` (D,) times."""
    if name == HESSIAN_TRACE:
        n = weights * np.asarray(curvature.counts, dtype=np.float64)
        value = np.maximum(n @ to_array(curvature.traces) / n.sum(), 0.0) / numel
    else:
        value = np.abs(weights @ to_array(curvature.eigenvalues) / weights.sum())
    return _of(value, weight_error)


def deviation_of(sensitivities: Sensitivities, name: str) -> Floats | None:
    """Return what one standard deviation of risk adds to a score (L, F), if it has its own."""
    curvature = sensitivities.curvature
    if name not in CURVATURE_SCORES or curvature is None:
        return None
    return evaluate_curvature(name, curvature, *_facts_of(sensitivities)).deviation


def resample_shards(
    sensitivities: Sensitivities, name: str, generator: np.random.Generator
) -> Floats:
    """Return a score (L, F) from shards drawn with replacement.

    Args:
        sensitivities: with their `curvature`.
        name: one of `CURVATURE_SCORES`.
        generator: source of randomness.
    """
    curvature = sensitivities.curvature
    assert curvature is not None
    count = len(curvature.counts)
    weights = np.bincount(generator.integers(0, count, count), minlength=count).astype(np.float64)
    return resampled_curvature(name, curvature, *_facts_of(sensitivities), weights)


def lacking(name: str, sensitivities: Sensitivities) -> str:
    """Return what to say and do about a score that a table does not hold."""
    held = f"score {name!r} is not in this table, which has {', '.join(sensitivities.scores)}; "
    if name not in CURVATURE_SCORES:
        return held + "it was probed with positions 0. Probe again, or choose another score."
    return held + (
        "it comes from second derivatives, which are measured only where they are asked for. Run "
        f"`hawqkit probe RUN/recipe.yaml -o RUN --set sensitivity.also=[{name}]` with RUN this "
        "run's folder: the probe is taken from there, and the score is added (in Python: "
        f"hk.probe(..., also=[{name!r}])). Or choose another score."
    )


def layer_traces_of(curvature: Curvature) -> tuple[Floats, Floats]:
    """Return tr(H_l) over all shards with its standard error, (L,) each; the sign is kept.

    Shards are averaged by their counted predictions, which gives the trace of the Hessian of their
    joint mean loss.
    """
    traces, of_probes = to_array(curvature.traces), to_array(curvature.trace_stderr)  # (D, L)
    n = np.asarray(curvature.counts, dtype=np.float64)
    sums = {"trace": n[:, None] * traces, "count": n}
    value, over_shards = jackknife(lambda s: s["trace"] / s["count"][..., None], sums)
    probes = np.sqrt(n**2 @ of_probes**2) / n.sum()
    # The spread over shards holds the probes' error, but from few shards it may come out below it.
    stderr = np.maximum(over_shards, probes) if len(n) > 1 else probes
    return value, stderr


def layer_eigenvalues_of(curvature: Curvature) -> tuple[Floats, Floats]:
    """Return mean and standard deviation over shards of each layer's top eigenvalue, (L,) each.

    The sign is kept. The deviation is that of a sample, NaN for a single shard.
    """
    values = to_array(curvature.eigenvalues)  # (D, L)
    mean = values.mean(0)
    if len(values) < 2:
        return mean, np.full(mean.shape, np.nan)
    return mean, values.std(0, ddof=1)


def with_curvature(sensitivities: Sensitivities, curvature: Curvature) -> Sensitivities:
    """Return a table with the scores that a measurement allows, instead of any it had before."""
    plain = without_curvature(sensitivities)
    scores = dict(plain.scores)
    for name in measured_scores(curvature):
        found = evaluate_curvature(name, curvature, *_facts_of(plain))
        scores[name] = Score(name, to_table(found.values), to_table(found.stderr))
    notes = (*_of_signs(plain, curvature), *_of_inputs(plain, curvature))
    curvature = replace(curvature, warnings=(*curvature.warnings, *notes))
    warnings = (*plain.warnings, *curvature.warnings)
    return replace(plain, scores=scores, curvature=curvature, warnings=warnings)


def without_curvature(sensitivities: Sensitivities) -> Sensitivities:
    """Return a table as the dual probe alone makes it."""
    curvature = sensitivities.curvature
    if curvature is None:
        return sensitivities
    return replace(
        sensitivities,
        scores={n: s for n, s in sensitivities.scores.items() if n not in CURVATURE_SCORES},
        curvature=None,
        warnings=tuple(w for w in sensitivities.warnings if w not in curvature.warnings),
    )


def _facts_of(sensitivities: Sensitivities) -> tuple[Floats, Floats]:
    """Return entries (L,) and |dW|^2 (L, F)."""
    numel = np.array([layer.numel for layer in sensitivities.layers], dtype=np.float64)
    return numel, to_array(sensitivities.weight_error)


def _of(value: Floats, weight_error: Floats) -> Floats:
    """Return `1/2 value |dW|^2`, exactly zero where nothing is rounded."""
    return np.where(weight_error == 0, 0.0, 0.5 * value[:, None] * weight_error)


def _of_signs(sensitivities: Sensitivities, curvature: Curvature) -> list[str]:
    """Say where a negative number went into a score, which itself is never negative."""
    names = [layer.name for layer in sensitivities.layers]
    found = []
    if curvature.traces:
        value, stderr = layer_traces_of(curvature)
        found += _of_errors(names, value, stderr, curvature)
        rows = zip(names, value, stderr, strict=True)
        below = [f"{n} {v:.3g} +- {e:.2g}" for n, v, e in rows if v < 0]
        if below:
            found.append(
                f"{HESSIAN_TRACE}: the trace of {len(below)} of {len(names)} layers is estimated "
                f"below zero, and their score is zero: {_capped(below)}."
            )
    if curvature.eigenvalues:
        values = to_array(curvature.eigenvalues)
        negative = [f"{n} {v:.3g}" for n, v in zip(names, values.mean(0), strict=True) if v < 0]
        if negative:
            found.append(
                f"{TOP_EIGENVALUE}: in {len(negative)} of {len(names)} layers the mean of the "
                f"eigenvalue of largest magnitude is negative, and its magnitude counts: "
                f"{_capped(negative)}."
            )
        mixed = [n for n, v in zip(names, values.T, strict=True) if v.min() < 0 < v.max()]
        if mixed:
            found.append(
                f"{TOP_EIGENVALUE}: in {len(mixed)} of {len(names)} layers its sign changes from "
                f"shard to shard, so that the mean is small and the deviation large; risk 1 adds "
                f"it: {_capped(mixed)}."
            )
    return found


def _of_inputs(sensitivities: Sensitivities, curvature: Curvature) -> list[str]:
    """Say that these scores leave the errors of inputs out, where formats round inputs."""
    rounding = with_activations(sensitivities.formats)
    if not rounding:
        return []
    return [
        f"{name}: knows the errors of weights alone, so that {rounding[0]} counts as "
        f"{parse_format(rounding[0]).weights.name} does; the other scores know those of inputs too."
        for name in measured_scores(curvature)
    ]


def _of_errors(names: list[str], value: Floats, stderr: Floats, curvature: Curvature) -> list[str]:
    """Say which traces are known less well than was asked, by their probes alone."""
    n = np.asarray(curvature.counts, dtype=np.float64)
    probes = np.sqrt(n**2 @ to_array(curvature.trace_stderr) ** 2) / n.sum()
    rough = [name for name, v, e in zip(names, value, probes, strict=True)
             if e > curvature.relative_error * abs(v)]  # fmt: skip
    lost = [name for name, v, e in zip(names, value, stderr, strict=True) if 2 * e > abs(v)]
    found = []
    if rough:
        found.append(
            f"{HESSIAN_TRACE}: in {len(rough)} of {len(names)} layers the probes' standard error "
            f"is above {curvature.relative_error:g} of the trace's magnitude: {_capped(rough)}. "
            "More probes narrow it (sensitivity.curvature.max_probes)."
        )
    if lost:
        found.append(
            f"{HESSIAN_TRACE}: in {len(lost)} of {len(names)} layers the trace is within two "
            f"standard errors of zero, so that it hardly decides: {_capped(lost)}."
        )
    return found


def _capped(words: list[str]) -> str:
    more = f" and {len(words) - NAMED} more" if len(words) > NAMED else ""
    return ", ".join(words[:NAMED]) + more
