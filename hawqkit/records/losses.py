"""What mixes add to the mean of any loss, measured: the answer to what a probe with it predicts."""

from __future__ import annotations

from dataclasses import dataclass

from hawqkit.records.decided import Prediction, Totals
from hawqkit.records.measured import DataFacts
from hawqkit.records.schema import SCHEMA


@dataclass(frozen=True, slots=True)
class MeasuredLoss:
    """What one mix adds to the mean loss; standard errors are jackknives over clusters.

    Attributes:
        name: of the mix.
        totals: what it takes.
        prediction: from examples that did not choose it, None where none were withheld; its `kl`
            and `joint` are increases of this loss.
        loss: mean of the mix's loss.
        increase: loss minus the original's, paired by example.
        curved: mean of `loss(z + dz) - loss(z) - loss'(z) dz`, what a second-order prediction is
            about: the increase without the part that is linear in the change of the outputs, which
            the noise in the targets makes and which averages out in a trained network. Of the
            cross-entropy it is the KL divergence.
        difference: `curved` minus the chosen mix's, paired by example.
    """

    name: str
    totals: Totals
    prediction: Prediction | None
    loss: float
    loss_stderr: float
    increase: float
    increase_stderr: float
    curved: float
    curved_stderr: float
    difference: float
    difference_stderr: float


@dataclass(frozen=True, slots=True)
class LossMeasurement:
    """Predicted against measured, in the unit of a loss.

    Attributes:
        loss: its name.
        data: what it was measured on.
        counted: predictions that the means are over.
        original: mean loss of the original.
        original_stderr: its error.
        mixes: the chosen one first, then the baselines.
        allocation: fingerprint of the sensitivities that chose.
    """

    loss: str
    data: DataFacts
    counted: int
    original: float
    original_stderr: float
    mixes: tuple[MeasuredLoss, ...]
    allocation: str = ""
    schema: int = SCHEMA

    @property
    def chosen(self) -> MeasuredLoss:
        """The chosen mix."""
        return self.mixes[0]
