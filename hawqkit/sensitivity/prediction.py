"""The predicted loss of one whole mix, from sequences that the choice has not seen.

Choosing and predicting with the same samples is optimistic: the solver prefers formats whose noise
happens to be low (the winner's curse). Sequences withheld from the choice have no such bias.

Letters: S sequences, L layers, F formats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hawqkit.errors import InputError
from hawqkit.records import Floats, Integers, Layer, Prediction, Samples
from hawqkit.sensitivity.participation import participation_ratios
from hawqkit.statistics import cluster_sums, jackknife


def predict(
    samples: Samples,
    layers: Sequence[Layer],
    formats: Sequence[str],
    mix: Mapping[str, str],
    rows: Integers | None = None,
) -> Prediction:
    """Predict the mean KL of `mix` in nats.

    With q_s = 1/2 sum_l (g_s . dW_l)^2 and j_s = 1/2 (sum_l g_s . dW_l)^2:

        kl    = sum_s q_s / sum_s n_s     layers by themselves: quiet, 2 % to 5 % at 64 sequences
        joint = sum_s j_s / sum_s n_s     with the interactions: each term is one squared Gaussian
                                          number, so its error is sqrt(2 / S), 14 % to 22 % at 64

    `spread` is `sqrt(2 / participation ratio)` of the network, the relative deviation of dW' G dW
    if dW were random. Standard errors are jackknives over documents.

    Args:
        samples: of the probe.
        layers: L layers.
        formats: F names, the columns of the samples.
        mix: layer name -> format name.
        rows: the sequences to predict from; default those withheld from choosing.

    Raises:
        InputError: there are no such sequences.
    """
    rows = np.flatnonzero(samples.withheld == 1) if rows is None else rows
    if not len(rows):
        raise InputError("nothing was withheld from choosing; set calibration.withheld above 0.")
    products = _products(samples, layers, formats, mix)[rows]  # (S, L)
    clusters = samples.document[rows]
    sums = {
        "q": cluster_sums(0.5 * (products**2).sum(1), clusters),
        "j": cluster_sums(0.5 * products.sum(1) ** 2, clusters),
        "n": cluster_sums(samples.count[rows].astype(np.float64), clusters),
    }
    kl, kl_stderr = jackknife(lambda s: s["q"] / s["n"], sums)
    joint, joint_stderr = jackknife(lambda s: s["j"] / s["n"], sums)
    between, between_stderr = jackknife(lambda s: (s["j"] - s["q"]) / s["n"], sums)
    ratio = participation_ratios(samples)[1]
    return Prediction(
        kl=float(kl),
        kl_stderr=_finite(kl_stderr),
        joint=float(joint),
        joint_stderr=_finite(joint_stderr),
        interactions=float(between),
        interactions_stderr=_finite(between_stderr),
        spread=float(np.sqrt(2 / ratio)) if np.isfinite(ratio) else None,
        sequences=len(rows),
    )


def cross_fitted(
    samples: Samples,
    layers: Sequence[Layer],
    formats: Sequence[str],
    choose: Callable[[Integers], Mapping[str, str]],
    folds: int = 4,
) -> tuple[float, float]:
    """Estimate the KL of the procedure: choose on all folds but one, predict on that one, in turn.

    Folds are of whole documents, over all sequences. Returns the mean over sequences and its
    jackknife standard error; with fewer than two documents a `folds`-fold split does not exist and
    the error is infinite.

    Args:
        samples: of the probe.
        layers: L layers.
        formats: F names, the columns of the samples.
        folds: number of folds.
        choose: rows -> mix, the whole procedure from scores to solver.
    """
    documents = np.unique(samples.document)
    fold_of = dict(zip(documents, np.arange(len(documents)) % folds, strict=True))
    fold = np.array([fold_of[d] for d in samples.document])
    q = np.zeros(len(samples.index))
    for k in np.unique(fold):
        held, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        if not len(rest):
            return float("nan"), float("inf")
        products = _products(samples, layers, formats, choose(rest))[held]
        q[held] = 0.5 * (products**2).sum(1)
    sums = {
        "q": cluster_sums(q, samples.document),
        "n": cluster_sums(samples.count.astype(np.float64), samples.document),
    }
    value, stderr = jackknife(lambda s: s["q"] / s["n"], sums)
    return float(value), float(stderr)


def _products(
    samples: Samples, layers: Sequence[Layer], formats: Sequence[str], mix: Mapping[str, str]
) -> Floats:
    """Return each sequence's g . dW of every layer in its format, (S, L)."""
    column = {f: i for i, f in enumerate(formats)}
    chosen = np.array([column[mix[layer.name]] for layer in layers])
    return samples.directional[:, np.arange(len(layers)), chosen]


def _finite(value: Floats) -> float:
    """Return the error, or raise: a prediction from one document has none."""
    if not np.isfinite(value):
        raise InputError(
            "what was withheld comes from a single document or cluster, so a prediction has no "
            "standard error; withhold more, or calibrate on data of several."
        )
    return float(value)
