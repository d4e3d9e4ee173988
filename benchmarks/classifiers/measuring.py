"""Logits of many mixes on held-out examples, kept on disk, and paired comparisons of them.

Letters: S examples, C classes, D seeds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from hawqkit.models import Examples, LoadedModel
from hawqkit.models.batch import predictions
from hawqkit.quantize.apply import applied

Array = NDArray[np.float64]
BATCH = 100


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a mix does on each held-out example, (S,) each.

    Attributes:
        kl: KL(original || mix), nats.
        flips: 1 where the most likely class is another.
        right: 1 where it is the true one.
        was_right: the same of the original.
    """

    kl: Array
    flips: Array
    right: Array
    was_right: Array


def outcome(
    model: LoadedModel,
    mix: Mapping[str, str],
    examples: Examples,
    *,
    rounding: str,
    folder: Path,
) -> Outcome:
    """Run the original and the mix, or read their logits from `folder`."""
    before = _logits(model, {}, examples, rounding, folder)
    after = _logits(model, mix, examples, rounding, folder)
    labels = examples.labels.numpy()
    p, q = _log_softmax(before), _log_softmax(after)
    return Outcome(
        kl=(np.exp(p) * (p - q)).sum(1),
        flips=(p.argmax(1) != q.argmax(1)).astype(np.float64),
        right=(q.argmax(1) == labels).astype(np.float64),
        was_right=(p.argmax(1) == labels).astype(np.float64),
    )


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(1, keepdims=True)
    log: Array = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return log


@torch.no_grad()
def _logits(
    model: LoadedModel, mix: Mapping[str, str], examples: Examples, rounding: str, folder: Path
) -> Array:
    """Return (S, C) in float64."""
    said = [model.facts.hash, examples.facts.hash, sorted(mix.items()), rounding if mix else ""]
    digest = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    path = folder / "logits" / f"{digest[:24]}.npy"
    if not path.exists():
        with applied(model, mix, rounding=rounding):
            parts = [
                predictions(model.module, part, model.device)[:, 0]
                for part in examples.micro_batches(BATCH)
            ]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished.npy")
        np.save(unfinished, torch.cat(parts).float().numpy())
        unfinished.replace(path)
    kept: Array = np.load(path).astype(np.float64)
    return kept


def stacked(outcomes: list[Outcome], name: str) -> Array:
    """Return one quantity of several seeds, (D, S)."""
    return np.stack([getattr(o, name) for o in outcomes])


def mean_and_error(values: Array) -> tuple[float, float, float]:
    """Return the mean of (D, S), its error over examples, and its error over seeds.

    Over examples: the standard error of the mean over seeds, so that an example counts once. Over
    seeds: that of the D means; zero for a single seed.
    """
    by_example, by_seed = values.mean(0), values.mean(1)
    over_seeds = by_seed.std(ddof=1) / np.sqrt(len(by_seed)) if len(by_seed) > 1 else 0.0
    over_examples = by_example.std(ddof=1) / np.sqrt(len(by_example))
    return float(values.mean()), float(over_examples), float(over_seeds)
