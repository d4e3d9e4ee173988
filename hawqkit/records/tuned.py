"""The record of a tuning run; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hawqkit.records.decided import Validation
from hawqkit.records.measured import DataFacts
from hawqkit.records.schema import SCHEMA


@dataclass(frozen=True, slots=True)
class TuningCurve:
    """What each step of the optimizer saw, in their order.

    Attributes:
        loss: mean over the predictions of its batch, in nats, distillation included; before the
            step changed anything.
        learning_rate: of the step.
        gradient_norm: Euclidean, of everything that is trained, before clipping.
        cross_entropy: with the labels alone, mean over the same predictions; `loss` itself without
            distillation. Empty in records of before it was kept, as is `accuracy`.
        accuracy: share of these predictions whose most likely class or token is the true one.
    """

    loss: tuple[float, ...]
    learning_rate: tuple[float, ...]
    gradient_norm: tuple[float, ...]
    cross_entropy: tuple[float, ...] = ()
    accuracy: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class HeldOutLoss:
    """What the network in training does on data that do not train, rounded as it is trained.

    Attributes:
        text: name of the data.
        step: of the optimizer, that were made before; 0 is the mix before tuning.
        examples: that were measured, evenly spread over the data.
        loss: mean cross-entropy in nats.
        loss_stderr: clustered by document; None where a single example has none.
        accuracy: share of predictions in which the most likely class or token is the true one.
        accuracy_stderr: likewise.
    """

    text: str
    step: int
    examples: int
    loss: float
    loss_stderr: float | None
    accuracy: float
    accuracy_stderr: float | None


@dataclass(frozen=True, slots=True)
class LearnedScale:
    """How far training has moved the scales of one layer's weight, or of its inputs.

    Attributes:
        layer: its name.
        what: `weight` or `input`.
        count: scales.
        change: mean of |scale| after training over |scale| before it, minus one.
    """

    layer: str
    what: str
    count: int
    change: float


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a mix was tuned, and what that changed: `tuning.json`.

    The tuned weights, their scales and the ranges of inputs have files of their own.

    Attributes:
        model: hash of the original.
        tuned: hash of the tuned model, its layers rounded.
        layers: layer name -> format name.
        data: the examples that trained.
        examples: how many of them trained, withheld ones aside.
        settings: what tuning was told.
        steps: of the optimizer.
        curve: step by step.
        allocation: fingerprint of the sensitivities that the mix was chosen from; empty for a mix
            that nothing has chosen.
        validation: the mix before tuning (`chosen`) and after it (`tuned`) on held-out data, both
            against the original; None if there was none.
        learned: the scales that were trained.
        held_out: losses on held-out data along the way, in the order of steps; empty without such
            data, and in records of before they were kept.
        fingerprint: hash over everything that the result depends on.
        warnings: for instance scales that stand where `SMALLEST_STEP` holds them.
    """

    model: str
    tuned: str
    layers: dict[str, str]
    data: DataFacts
    examples: int
    settings: dict[str, Any]
    steps: int
    curve: TuningCurve
    allocation: str = ""
    validation: Validation | None = None
    learned: tuple[LearnedScale, ...] = ()
    held_out: tuple[HeldOutLoss, ...] = ()
    fingerprint: str = ""
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Refuse a curve that is not of all steps."""
        for name in ("loss", "learning_rate", "gradient_norm"):
            if len(getattr(self.curve, name)) != self.steps:
                raise ValueError(f"curve.{name} is not of {self.steps} steps")
        for name in ("cross_entropy", "accuracy"):
            if len(getattr(self.curve, name)) not in (0, self.steps):
                raise ValueError(f"curve.{name} is not of {self.steps} steps")
        if any(not 0 <= point.step <= self.steps for point in self.held_out):
            raise ValueError(f"held_out has steps beyond the {self.steps} that there are")
