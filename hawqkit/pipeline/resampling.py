"""The choice made again from other examples: what it is worth, and how stable. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from hawqkit.allocation import Allocated, Problem, shares_of_choices, with_scores
from hawqkit.pipeline.interacting import solved
from hawqkit.records import Floats, Integers, Prediction, Samples, Sensitivities, to_array
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES, deviation_of, resample_shards
from hawqkit.sensitivity.participation import participation_ratios
from hawqkit.sensitivity.prediction import cross_fitted
from hawqkit.sensitivity.scores import evaluate, evaluate_totals, sums_of, with_risk
from hawqkit.sensitivity.summary import facts_of
from hawqkit.statistics import bootstrap_weights

if TYPE_CHECKING:
    from hawqkit.pipeline.choosing import ChoiceSettings


def _table_from(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    rows: Integers,
    weights: Floats | None = None,
) -> Floats:
    """Return the table that the procedure would have made of these sequences alone."""
    sums = sums_of(samples, rows, weights)
    facts = facts_of(sensitivities)
    if settings.risk == 0:
        return evaluate_totals(name, sums, facts)
    values, stderr = evaluate(name, sums, facts)
    ratios = participation_ratios(samples)[0]
    return with_risk(name, values, stderr, ratios, settings.risk)


def with_cross_fit(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    found: Allocated,
    prediction: Prediction,
    share: float,
) -> Prediction:
    """Cross-fit the choice within the budgets, and within the size that a limit on the KL gave."""
    if name in CURVATURE_SCORES:
        return prediction  # it is not made from the sequences that folds are cut from

    def mix_from(rows: Integers) -> Mapping[str, str]:
        table = _table_from(sensitivities, samples, settings, name, rows)
        problem = with_scores(found.problem, table)
        return problem.mix(solved(problem, samples, share, rows).choice)

    value, stderr = cross_fitted(samples, sensitivities.layers, sensitivities.formats, mix_from)
    if not np.isfinite([value, stderr]).all():
        return prediction
    return replace(prediction, cross_fitted=value, cross_fitted_stderr=stderr)


def stability(
    sensitivities: Sensitivities,
    settings: ChoiceSettings,
    name: str,
    found: Allocated,
    share: float,
) -> dict[str, float]:
    """Return layer name -> share of choices from data drawn again in which it keeps its format."""
    samples: Samples | None = sensitivities.samples
    if samples is None or not settings.draws or indivisible(sensitivities, name):
        return {}
    return shares_of_choices(
        found.problem,
        found.solution.choice,
        partial(_choose_again, sensitivities, samples, settings, name, found.problem, share),
        draws=settings.draws,
        generator=np.random.default_rng(settings.seed),
    )


def indivisible(sensitivities: Sensitivities, name: str) -> bool:
    """Whether a score was measured in one piece, of which there is nothing to draw again."""
    curvature = sensitivities.curvature
    return name in CURVATURE_SCORES and curvature is not None and len(curvature.counts) < 2


def _choose_again(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    problem: Problem,
    share: float,
    generator: np.random.Generator,
) -> Integers:
    """Choose by the whole procedure from documents, or shards, drawn with replacement."""
    rows = np.flatnonzero(samples.withheld == 0)
    if name in CURVATURE_SCORES:
        values = resample_shards(sensitivities, name, generator)
        stderr = to_array(sensitivities.scores[name].stderr)
        ratios = to_array(sensitivities.participation_ratio)
        own = deviation_of(sensitivities, name)
        table, weights = with_risk(name, values, stderr, ratios, settings.risk, own), None
    else:
        weights = bootstrap_weights(samples.document[rows], generator)
        table = _table_from(sensitivities, samples, settings, name, rows, weights)
    return solved(with_scores(problem, table), samples, share, rows, weights).choice
