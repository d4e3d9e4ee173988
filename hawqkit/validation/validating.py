"""From token results to the record: means, errors, paired differences, predictions beside them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.records import (
    Allocation,
    Floats,
    Integers,
    Measured,
    Mix,
    ValidatedMix,
    Validation,
)
from hawqkit.statistics import ratio
from hawqkit.validation.measuring import TokenResults, Track, measure_text

CHOSEN = "chosen"


def validate_mixes(
    model: LoadedModel,
    allocation: Allocation,
    texts: Mapping[str, Data],
    *,
    track: Track,
    batch: int = 4,
) -> Validation:
    """Measure the chosen mix and every baseline on every text.

    Args:
        model: the original model; it is restored bit for bit.
        allocation: the chosen mix and its baselines.
        texts: name -> sequences or examples that the choice has not seen.
        track: shows progress.
        batch: sequences that go through the model together.

    Returns:
        KL, same-top-1 rate, loss and perplexity with standard errors clustered by document, and
        each baseline's KL minus the chosen mix's, paired by sequence.
    """
    chosen = Mix(
        CHOSEN,
        "what hawqkit chose",
        allocation.layers,
        allocation.totals,
        allocation.objective,
        allocation.prediction,
    )
    mixes = {m.name: m for m in (chosen, *allocation.baselines)}
    original: dict[str, tuple[float, float]] = {}
    measured: dict[str, dict[str, Measured]] = {name: {} for name in mixes}
    for text_name, text in texts.items():
        first, results = measure_text(
            model,
            {name: m.layers for name, m in mixes.items()},
            text,
            rounding=allocation.rounding,
            batch=batch,
            track=track,
            stage=f"validate on {text_name}",
        )
        clusters = text.document.numpy().astype(np.int64)
        original[text_name] = _mean(first, first.loss, clusters)
        for name in mixes:
            measured[name][text_name] = _measured(results[name], results[CHOSEN], clusters)
    return Validation(
        texts={name: text.facts for name, text in texts.items()},
        original=original,
        mixes=tuple(
            ValidatedMix(m.name, m.about, m.totals, m.prediction, measured[m.name])
            for m in mixes.values()
        ),
        allocation=allocation.sensitivities,
    )


def _measured(mix: TokenResults, chosen: TokenResults, clusters: Integers) -> Measured:
    kl, kl_stderr = _mean(mix, mix.kl, clusters)
    same, same_stderr = _mean(mix, mix.same_top1, clusters)
    loss, loss_stderr = _mean(mix, mix.loss, clusters)
    difference, difference_stderr = _mean(mix, mix.kl - chosen.kl, clusters)
    return Measured(
        kl=kl,
        kl_stderr=kl_stderr,
        kl_median=float(np.median(mix.kl)),
        kl_p99=float(np.quantile(mix.kl, 0.99)),
        same_top1=same,
        same_top1_stderr=same_stderr,
        loss=loss,
        loss_stderr=loss_stderr,
        perplexity=float(np.exp(loss)),
        difference=difference,
        difference_stderr=difference_stderr,
    )


def _mean(results: TokenResults, values: Floats, clusters: Integers) -> tuple[float, float]:
    """Return the token mean and its jackknife error; with one document, over sequences."""
    count = len(clusters)
    sums = np.bincount(results.sequence, weights=values, minlength=count).astype(np.float64)
    counts = np.bincount(results.sequence, minlength=count).astype(np.float64)
    apart = clusters if len(np.unique(clusters)) > 1 else np.arange(count)
    mean, stderr = ratio(sums, counts, apart)
    return float(mean), float(stderr)
