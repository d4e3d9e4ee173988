"""From predictions on labelled examples to accuracy, flips and confusion, each with its error.

Letters: N examples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hawqkit.models.batch import Data
from hawqkit.models.examples import Examples
from hawqkit.records import (
    Classification,
    Classified,
    Flip,
    Floats,
    Integers,
    make_confusion,
)
from hawqkit.statistics import ratio, share, wilson
from hawqkit.validation.measuring import TokenResults
from hawqkit.validation.pictures import thumbnails

MOST_FLIPS = 24  # flipped examples that are kept of each mix


def classify(
    original: TokenResults,
    mixes: Mapping[str, TokenResults],
    data: Data,
    *,
    chosen: str,
    keep: bool = True,
) -> Classification:
    """Compare each mix with the original, and with the chosen mix, example by example.

    Args:
        original: one prediction for each of N examples.
        mixes: name -> the same examples, in the same order.
        data: where the examples come from; its clusters make the errors.
        chosen: name of the mix that was chosen; its flipped examples keep a picture.
        keep: keep confusion and flipped examples, beside the shares.

    Returns:
        what the original and each mix do.
    """
    names = data.names if isinstance(data, Examples) else ()
    clusters = data.document.numpy().astype(np.int64)[original.sequence]
    found = {}
    for name, mix in mixes.items():
        some = _flips(original, mix, data if name == chosen else None) if keep else ()
        found[name] = _classified(mix, original, mixes[chosen], clusters, some, keep)
    return Classification(
        count=len(original.sequence),
        classes=original.classes,
        names=tuple(names) if len(names) == original.classes else (),
        original=_classified(original, original, mixes[chosen], clusters, (), keep),
        mixes=found,
    )


def _classified(
    model: TokenResults,
    original: TokenResults,
    chosen: TokenResults,
    clusters: Integers,
    flips: tuple[Flip, ...],
    keep: bool,
) -> Classified:
    right, before = _right(model), _right(original)
    flipped = model.top1 != original.top1
    accuracy, stderr = share(right, clusters)
    difference = share(right - before, clusters)
    against = share(right - _right(chosen), clusters)
    loss, worse = _mean(model.loss, clusters), _mean(model.loss - original.loss, clusters)
    return Classified(
        accuracy=accuracy,
        accuracy_stderr=stderr,
        interval=wilson(accuracy, _worth(accuracy, stderr, clusters)),
        loss=loss[0],
        loss_stderr=loss[1],
        difference=difference[0],
        difference_stderr=difference[1],
        against_chosen=against[0],
        against_chosen_stderr=against[1],
        loss_difference=worse[0],
        loss_difference_stderr=worse[1],
        became_wrong=int((flipped & (before == 1)).sum()),
        became_right=int((flipped & (right == 1)).sum()),
        stayed_wrong=int((flipped & (before == 0) & (right == 0)).sum()),
        confusion=make_confusion(model.target, model.top1, model.classes) if keep else None,
        flips=flips,
    )


def _right(model: TokenResults) -> Floats:
    return np.asarray(model.top1 == model.target, dtype=np.float64)


def _mean(values: Floats, clusters: Integers) -> tuple[float, float]:
    """Return the mean over examples with its jackknife error over clusters."""
    apart = clusters if len(np.unique(clusters)) > 1 else np.arange(len(values))
    mean, stderr = ratio(values, np.ones(len(values)), apart)
    return float(mean), float(stderr)


def _worth(accuracy: float, stderr: float, clusters: Integers) -> float:
    """Return how many independent examples the clustered ones are worth: a (1 - a) / stderr^2."""
    if stderr > 0:
        return accuracy * (1 - accuracy) / stderr**2
    groups = len(np.unique(clusters))
    return groups if groups > 1 else len(clusters)


def _flips(original: TokenResults, mix: TokenResults, pictured: Data | None) -> tuple[Flip, ...]:
    """Return the flipped examples of which the original was surest; ties by their index."""
    rows = np.flatnonzero(mix.top1 != original.top1)
    order = np.lexsort((original.sequence[rows], -original.probability[rows]))
    rows = rows[order[:MOST_FLIPS]]
    places = original.sequence[rows].tolist()
    pictures = [""] * len(places) if pictured is None else thumbnails(pictured, places)
    return tuple(
        Flip(
            index=place,
            label=int(mix.target[row]),
            before=int(original.top1[row]),
            after=int(mix.top1[row]),
            before_probability=float(original.probability[row]),
            after_probability=float(mix.probability[row]),
            picture=picture,
        )
        for row, place, picture in zip(rows.tolist(), places, pictures, strict=True)
    )
