"""From the probe's raw sums to the table that people read: `records.Sensitivities`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hawqkit.formats import NONE
from hawqkit.records import (
    CROSS_ENTROPY,
    DataFacts,
    Floats,
    Layer,
    ModelFacts,
    Samples,
    Score,
    Sensitivities,
    Skipped,
    to_array,
    to_numbers,
    to_table,
)
from hawqkit.sensitivity.participation import participation_ratios
from hawqkit.sensitivity.scores import AUTO, SCORES, Facts, evaluate, sums_of
from hawqkit.statistics import jackknife

FEW_DOCUMENTS = 8


def summarize(
    samples: Samples,
    weight_error: Floats,
    *,
    model: ModelFacts,
    data: DataFacts,
    layers: Sequence[Layer],
    skipped: Sequence[Skipped],
    formats: Sequence[str],
    rounding: str,
    fingerprint: str,
    loss: str = CROSS_ENTROPY,
) -> Sensitivities:
    """Evaluate every score with its standard error over the sequences that choose.

    Args:
        samples: of all sequences.
        weight_error: (L, F) |dW|^2.
        model: facts of the model.
        data: facts of the text.
        layers: L layers.
        skipped: weights that are left alone.
        formats: F names.
        rounding: `nearest` or `searched`.
        fingerprint: hash of all that the samples depend on.
        loss: name of the loss whose increase is predicted.
    """
    facts = score_facts(layers, weight_error)
    sums = sums_of(samples)
    # A network without any gradient has no norms either, whatever positions were asked for.
    with_token = bool((samples.token_norm > 0).any() or not samples.squared_gradient.any())
    names = [n for n in SCORES if with_token or n not in ("token", "token-summed", "shrunk")]
    scores = {}
    for name in names:
        values, stderr = evaluate(name, sums, facts)
        if NONE.name in formats:  # nothing is rounded, so nothing is lost, and that is exact
            values[:, formats.index(NONE.name)] = stderr[:, formats.index(NONE.name)] = 0.0
        scores[name] = Score(name, to_table(values), to_table(stderr))
    traces, trace_stderr = jackknife(lambda s: s["squared_gradient"] / s["count"][..., None], sums)
    layer_ratios, network_ratio = participation_ratios(samples)
    return Sensitivities(
        model=model,
        data=data,
        layers=tuple(layers),
        skipped=tuple(skipped),
        formats=tuple(formats),
        weight_error=to_table(weight_error),
        trace=to_numbers(traces),
        trace_stderr=to_numbers(trace_stderr),
        participation_ratio=to_numbers(layer_ratios),
        network_participation_ratio=float(network_ratio) if np.isfinite(network_ratio) else None,
        scores=scores,
        auto=AUTO if AUTO in scores else "trace",
        rounding=rounding,
        fingerprint=fingerprint,
        withheld=int((samples.withheld == 1).sum()),
        loss=loss,
        warnings=_warnings(samples, with_token, layers, data.by_example),
        samples=samples,
    )


def score_facts(layers: Sequence[Layer], weight_error: Floats) -> Facts:
    """Return what scores need beside the samples."""
    return Facts(np.array([layer.numel for layer in layers], dtype=np.float64), weight_error)


def facts_of(sensitivities: Sensitivities) -> Facts:
    """Return what scores need beside the samples, from a saved table."""
    return score_facts(sensitivities.layers, to_array(sensitivities.weight_error))


def _warnings(
    samples: Samples, with_token: bool, layers: Sequence[Layer], labelled: bool
) -> tuple[str, ...]:
    one, cluster = ("example", "cluster") if labelled else ("sequence", "document")
    warnings = []
    silent = (samples.squared_gradient == 0).all(0)
    still = [layer.name for layer, none in zip(layers, silent, strict=True) if none]
    if still:
        more = f" and {len(still) - 3} more" if len(still) > 3 else ""
        warnings.append(
            f"the predictions do not depend on {', '.join(still[:3])}{more}: no gradient came from "
            f"any {one}, so their sensitivity is zero and they get the smallest format; exclude "
            "them if other inputs use them."
        )
    documents = len(np.unique(samples.document[samples.withheld == 0]))
    if documents < FEW_DOCUMENTS:
        warnings.append(
            f"the {one}s that choose come from {documents} {cluster}s; standard errors are "
            f"clustered by {cluster} and are rough below {FEW_DOCUMENTS}."
        )
    if not len(samples.pairs):
        warnings.append(
            f"micro-batches hold one {one} each, so there is no participation ratio; "
            "set sensitivity.batch to 2 or more to get it."
        )
    if not with_token:
        warnings.append("positions is 0, so token scores are left out and auto means trace.")
    return tuple(warnings)
