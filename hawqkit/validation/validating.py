"""From token results to the record: means, errors, paired differences, predictions beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hawqkit.errors import InputError, NumericalError, Unsupported
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.records import (
    Allocation,
    Classification,
    Floats,
    Integers,
    Linearized,
    Measured,
    Mix,
    ValidatedMix,
    Validation,
)
from hawqkit.statistics import ratio
from hawqkit.validation.classifying import classify
from hawqkit.validation.linearized import linearized_kl, withheld_rows
from hawqkit.validation.measuring import TokenResults, Track, Variant, measure_text

CHOSEN, TUNED = "chosen", "tuned"
LINEARIZED_TOKENS = 2048  # of text, at some nine forward passes each


def validate_mixes(
    model: LoadedModel,
    allocation: Allocation,
    texts: Mapping[str, Data],
    *,
    track: Track,
    batch: int = 4,
    calibration: Data | None = None,
    tuned: Variant | None = None,
) -> Validation:
    """Measure the chosen mix and every baseline on every text, or set of labelled examples.

    Args:
        model: the original model; it is restored bit for bit.
        allocation: the chosen mix and its baselines.
        texts: name -> sequences or examples that the choice has not seen.
        track: shows progress.
        batch: sequences that go through the model together.
        calibration: the data that chose. On what was withheld of them, the chosen mix is
            predicted with linear logits and measured beside that (`linearized_kl`). The loss of
            labelled examples on which it was chosen, beside that on the others, shows how far the
            data have shifted.
        tuned: the chosen mix after tuning, measured as one more mix, whose KL is to the original
            too.

    Returns:
        KL, same-top-1 rate, loss and perplexity with standard errors clustered by document, and
        each baseline's KL minus the chosen mix's, paired by sequence. Of a classifier also
        accuracy, flips and confusion.

    Raises:
        InputError: `calibration` has neither labels nor withheld sequences.
    """
    if calibration is not None:
        _refuse_useless(calibration)
    chosen = Mix(
        CHOSEN,
        "what hawqkit chose",
        allocation.layers,
        allocation.totals,
        allocation.objective,
        allocation.prediction,
    )
    mixes = {m.name: m for m in (chosen, *allocation.baselines)}
    untuned = {name: m.layers for name, m in mixes.items()}
    if tuned is not None:
        mixes[TUNED] = replace(
            chosen, name=TUNED, about="the chosen mix after tuning", prediction=None
        )
    variants = {} if tuned is None else {TUNED: tuned}
    seen = _on_calibration(model, allocation, calibration, track=track, batch=batch)
    linear, warnings = _linearized(model, allocation, calibration, track=track, batch=batch)
    original: dict[str, tuple[float, float]] = {}
    measured: dict[str, dict[str, Measured]] = {name: {} for name in mixes}
    classification: dict[str, Classification] = {}
    for text_name, text in texts.items():
        first, results = measure_text(
            model,
            untuned,
            text,
            rounding=allocation.rounding,
            activations=allocation.activations,
            batch=batch,
            track=track,
            stage=f"validate on {text_name}",
            variants=variants,
        )
        clusters = text.document.numpy().astype(np.int64)
        original[text_name] = _mean(first, first.loss, clusters)
        if text.facts.classes:
            classification[text_name] = classify(first, results, text, chosen=CHOSEN)
        for name in mixes:
            measured[name][text_name] = _measured(results[name], results[CHOSEN], clusters)
    return Validation(
        texts={name: text.facts for name, text in texts.items()},
        original=original,
        mixes=tuple(
            ValidatedMix(
                m.name,
                m.about,
                m.totals,
                m.prediction,
                measured[n],
                linear if n == CHOSEN else None,
            )
            for n, m in mixes.items()
        ),
        allocation=allocation.sensitivities,
        warnings=warnings,
        classification=classification,
        calibration=seen,
    )


def _refuse_useless(calibration: Data) -> None:
    """Refuse data of which nothing is measured: no labels, and no sequence to predict on."""
    if not calibration.facts.classes and not withheld_rows(calibration):
        raise InputError(
            f"calibration: {calibration.facts.source} has no labels, and no sequence of it was "
            "withheld from choosing, so there is nothing to measure on it; withhold some, or leave "
            "calibration out."
        )


def _linearized(
    model: LoadedModel,
    allocation: Allocation,
    data: Data | None,
    *,
    track: Track,
    batch: int,
) -> tuple[Linearized | None, tuple[str, ...]]:
    """Return what linear logits predict of the chosen mix, or why they cannot.

    Of the others nobody asks why they lose what they lose, and each would take six more passes.
    """
    rows = [] if data is None else withheld_rows(data)
    if data is None or not rows:
        return None, ()
    if not data.facts.classes:  # a few sequences hold thousands of predictions
        rows = rows[: max(2, LINEARIZED_TOKENS // max(data.facts.length, 1))]
    try:
        found = linearized_kl(
            model,
            allocation.layers,
            data,
            rows=rows,
            rounding=allocation.rounding,
            activations=allocation.activations,
            batch=batch,
            track=track,
            stage="linearize",
        )
    except (NumericalError, Unsupported) as error:
        return None, (f"no prediction with linear logits: {error}",)
    return found, ()


def _on_calibration(
    model: LoadedModel, allocation: Allocation, data: Data | None, *, track: Track, batch: int
) -> Classification | None:
    """Return what the original and the chosen mix do with the examples that chose, by classes."""
    if data is None or not data.facts.classes:
        return None
    first, results = measure_text(
        model,
        {CHOSEN: allocation.layers},
        data,
        rounding=allocation.rounding,
        activations=allocation.activations,
        batch=batch,
        track=track,
        stage="validate on calibration",
        rows=np.flatnonzero(~data.withheld.numpy()).tolist(),
    )
    return classify(first, results, data, chosen=CHOSEN, keep=False)


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
