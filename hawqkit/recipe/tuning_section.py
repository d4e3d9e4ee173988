"""The section of a recipe that says how the chosen mix is tuned."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, StrictInt, model_validator

from hawqkit.recipe.data_sections import CLASSIFIERS, IMAGES, Section
from hawqkit.recipe.values import Number, Positive

DATA_KEYS = ("examples", "sequences", "length")


class DistillationSection(Section):
    """How much the original teaches."""

    alpha: Number = Field(
        default=0.5, gt=0, le=1, description="share of the loss that is the original's; 1 is all"
    )
    temperature: Positive = Field(default=2.0, description="that the logits of both are divided by")


class TuneSection(Section):
    """How the chosen mix is trained, on data of the calibration's source."""

    examples: StrictInt = Field(
        default=10_000, ge=1, description="of the calibration's source; classifiers only"
    )
    sequences: StrictInt = Field(default=512, ge=1, description="the same; language models only")
    length: StrictInt | None = Field(
        default=None, ge=2, description="tokens of a sequence or text; left out, as in calibration"
    )
    epochs: Positive = Field(default=1.0, description="passes over these; a part of one is allowed")
    steps: StrictInt | None = Field(
        default=None, ge=1, description="of the optimizer; replaces epochs"
    )
    batch: StrictInt = Field(default=64, ge=1, description="examples of a step, in all processes")
    micro_batch: StrictInt | None = Field(
        default=None, ge=1, description="examples of a forward pass; equal numbers but for rounding"
    )
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="sgd has momentum")
    learning_rate: Positive = Field(default=1e-4, description="at its highest")
    momentum: Number = Field(default=0.9, ge=0, lt=1, description="of sgd")
    weight_decay: Number = Field(
        default=0.0, ge=0, description="of matrices and kernels, not of biases, norms and scales"
    )
    schedule: Literal["cosine", "one-cycle", "constant"] = Field(
        default="cosine", description="of the learning rate, after warmup"
    )
    warmup: Annotated[float, Field(strict=True, ge=0, lt=1)] | None = Field(
        default=None, description="share of the steps; left out, 0.05, or 0.3 of one-cycle"
    )
    clip: Positive | None = Field(
        default=None, description="largest norm of the gradient; left out, it is not clipped"
    )
    learned_scales: Literal["none", "weights", "inputs", "both"] = Field(
        default="none", description="scales that are trained too (LSQ)"
    )
    start: Literal["rounded", "lsq"] = Field(
        default="rounded", description="where learned scales begin"
    )
    distillation: DistillationSection | None = Field(
        default=None, description="from the original; left out, labels alone teach"
    )
    batch_norm: Literal["frozen", "re-estimated"] = Field(
        default="frozen", description="whether its statistics are measured again, epoch by epoch"
    )
    seed: StrictInt = Field(default=0, ge=0, description="seed of the order of examples")
    checkpoint_every: StrictInt = Field(
        default=200, ge=1, description="steps from one checkpoint to the next"
    )

    @model_validator(mode="after")
    def _one_length_of_training(self) -> Self:
        if self.steps is not None and "epochs" in self.model_fields_set:
            raise ValueError("has epochs and steps; both say how long it trains: keep one.")
        if self.optimizer != "sgd" and "momentum" in self.model_fields_set:
            raise ValueError(
                f"momentum is of sgd, and optimizer is {self.optimizer}; leave it out."
            )
        return self


def foreign_tune_keys(task: str) -> dict[str, str]:
    """Return the keys of this section that mean nothing for a task, each with the reason."""
    if task not in CLASSIFIERS:
        reason = f"model.task is {task}, and this is of classifiers; give `sequences`."
        return {"examples": reason}
    found = {"sequences": f"model.task is {task}, and this is of language models; give `examples`."}
    if task == IMAGES:
        found["length"] = f"model.task is {task}, and this is of text; leave it out."
    return found


def drop_foreign_tune_keys(tune: dict[str, Any], task: str) -> None:
    """Take out of the section's plain data what would be refused when it is read again."""
    for key in foreign_tune_keys(task):
        del tune[key]
    if tune["steps"] is not None:
        del tune["epochs"]
    if tune["optimizer"] != "sgd":
        del tune["momentum"]
