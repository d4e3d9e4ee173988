"""What an allocation and its baselines add to any loss, measured example by example.

Letters in shapes: B examples of a batch, S examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hawqkit.curvature.data import to_device
from hawqkit.curvature.objective import Objective, output_residual
from hawqkit.curvature.output_roots import in_float64
from hawqkit.errors import InputError
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import Switch, applied
from hawqkit.records import (
    Allocation,
    Floats,
    Integers,
    LossMeasurement,
    MeasuredLoss,
    Prediction,
    Totals,
)
from hawqkit.sensitivity.objective_signs import losses_by_example
from hawqkit.statistics import ratio

CHOSEN = "chosen"


def measure_loss(
    model: LoadedModel,
    allocation: Allocation,
    data: Data,
    objective: Objective,
    *,
    batch: int = 16,
) -> LossMeasurement:
    """Measure what an allocation and its baselines add to the mean of a loss.

        increase = mean of loss(z + dz) - loss(z)
        curved   = mean of loss(z + dz) - loss(z) - loss'(z) dz

    `curved` is what a probe with the same objective predicts; for the cross-entropy it is the KL
    divergence that `validate` measures. The increase has a linear part besides, which is noise of
    the targets in a trained network and a real gain or loss in another.

    Args:
        model: the original; it comes back bit for bit.
        allocation: from `allocate`.
        data: examples, or text, that the choice has not seen.
        objective: the loss; by its name the one that the sensitivities are of.
        batch: examples that go through the model together.

    Raises:
        InputError: the sensitivities are of another loss, or the loss is no sum over examples.
        NumericalError: a loss is not finite.
    """
    if allocation.loss != objective.name:
        raise InputError(
            f"measure_loss: the objective is {objective.name}, and this allocation was chosen by "
            f"increases of {allocation.loss}, so its predictions could not be compared; give the "
            "objective that probe was given."
        )
    mixes: dict[str, tuple[Mapping[str, str], Totals, Prediction | None]] = {
        CHOSEN: (allocation.layers, allocation.totals, allocation.prediction)
    }
    mixes |= {m.name: (m.layers, m.totals, m.prediction) for m in allocation.baselines}
    found = {}
    for name, (layers, _, _) in mixes.items():
        with applied(
            model, layers, rounding=allocation.rounding, activations=allocation.activations
        ) as switch:
            found[name] = _measure(model, switch, data, objective, batch)
    clusters = data.document.numpy().astype(np.int64)
    first = found[CHOSEN]
    original = _mean(first.before, first.counts, clusters)
    return LossMeasurement(
        loss=objective.name,
        data=data.facts,
        counted=int(first.counts.sum()),
        original=original[0],
        original_stderr=original[1],
        mixes=tuple(
            _record(name, *mixes[name][1:], found[name], first.curved, clusters) for name in mixes
        ),
        allocation=allocation.sensitivities,
    )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums of each example, (S,) each."""

    before: Floats
    after: Floats
    linear: Floats
    counts: Integers

    @property
    def curved(self) -> Floats:
        return self.after - self.before - self.linear


def _measure(
    model: LoadedModel, switch: Switch, data: Data, objective: Objective, size: int
) -> _Sums:
    parts = []
    for given in data.micro_batches(size):
        part = to_device(given, model.device)
        switch.original()
        z = _outputs(model, objective, part)
        switch.quantized()
        changed = _outputs(model, objective, part)
        # Differences of nearly equal losses: float32 would leave two or three digits of them.
        z, wide = in_float64(objective, z, part)
        changed = changed.to(z.dtype)
        before, counts = losses_by_example(objective, z, wide, whole=True)
        after, _ = losses_by_example(objective, changed, wide)
        slope = output_residual(objective, z, wide) * (changed - z)
        linear = slope.reshape(len(z), -1).sum(1, dtype=torch.float64).cpu().numpy()
        parts.append((before, after, linear, counts))
    return _Sums(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def _outputs(model: LoadedModel, objective: Objective, batch: Any) -> Tensor:
    return objective.outputs(model.module, batch)


def _record(
    name: str,
    totals: Totals,
    prediction: Prediction | None,
    sums: _Sums,
    chosen: Floats,
    clusters: Integers,
) -> MeasuredLoss:
    columns = (sums.after, sums.after - sums.before, sums.curved, sums.curved - chosen)
    loss, increase, curved, difference = (_mean(c, sums.counts, clusters) for c in columns)
    return MeasuredLoss(name, totals, prediction, *loss, *increase, *curved, *difference)


def _mean(sums: Floats, counts: Integers, clusters: Integers) -> tuple[float, float]:
    """Return the mean over predictions and its jackknife error; of one cluster, over examples."""
    apart = clusters if len(np.unique(clusters)) > 1 else np.arange(len(sums))
    mean, stderr = ratio(sums, counts.astype(np.float64), apart)
    return float(mean), float(stderr)
