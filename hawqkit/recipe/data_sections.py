"""The sections of a recipe that say which model is measured, and on which data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from hawqkit.recipe.values import BUILTIN, Device, NonEmpty

IMAGES, TEXTS = "image-classification", "text-classification"
CLASSIFIERS = (IMAGES, TEXTS)
CLASSIFIER_EXPORTS = ("bits",)  # compressed-tensors is read by runtimes of language models
WITHHELD_EXAMPLES = 256  # of a classifier, each of which makes one prediction


class Section(BaseModel):
    """A mapping of a recipe: unknown keys are refused, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The model that is measured."""

    source: NonEmpty = Field(
        description="a hub id, a local folder, a GGUF file, or package:NAME/FILE"
    )
    revision: StrictStr | None = Field(
        default=None, description="branch, tag or commit of a hub id"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="dtype to compute in; auto keeps the stored one"
    )
    device: Device = Field(default="auto", description="auto takes the accelerator if there is one")
    trust_remote_code: StrictBool = Field(
        default=False, description="whether code that comes with the model may run"
    )
    task: Literal["causal-lm", "image-classification", "text-classification"] = Field(
        default="causal-lm", description="what the model predicts"
    )
    fold_batch_norm: StrictBool = Field(
        default=False,
        description="fold batch norms into the layers before them, where outputs stay equal",
    )


class TextSection(Section):
    """Data, and how much of it: text that is cut into sequences, or examples with labels."""

    source: NonEmpty = Field(
        default=BUILTIN,
        description="builtin, a .txt, .jsonl or .parquet file, or a data set's hub id; for "
        "classifiers an image folder, a .npz, .parquet, .jsonl or .csv file, or a data set",
    )
    split: NonEmpty = Field(
        default="calibration", description="calibration or held-out for builtin"
    )
    config: StrictStr | None = Field(default=None, description="configuration of a data set")
    column: StrictStr | None = Field(
        default=None, description="column that holds the text, messages or images"
    )
    labels: StrictStr | None = Field(
        default=None, description="column that holds the labels; classifiers only"
    )
    packing: Literal["packed", "padded"] = Field(
        default="packed",
        description="packed fills every sequence; padded keeps one document in each",
    )
    answers_only: StrictBool = Field(
        default=False, description="count only the assistant's answers"
    )
    sequences: StrictInt = Field(
        default=64, ge=2, description="number of sequences; errors need two"
    )
    examples: StrictInt = Field(
        default=512, ge=2, description="number of labelled examples; classifiers only"
    )
    length: StrictInt = Field(default=256, ge=2, description="tokens of a sequence or text")
    seed: StrictInt = Field(default=0, ge=0, description="seed of the choice of windows, examples")

    def count(self, task: str) -> int:
        """Return how many sequences, or labelled examples, may choose."""
        return self.examples if task in CLASSIFIERS else self.sequences


class CalibrationSection(TextSection):
    """The data that measure sensitivities."""

    withheld: StrictInt = Field(
        default=32,
        ge=0,
        description="more of them, which the choice never sees: they predict its loss; 256 "
        "examples where a classifier's recipe does not say",
    )


class HeldOutSection(TextSection):
    """Data on which validation measures; the choice never sees them."""

    split: NonEmpty = Field(default="held-out", description="calibration or held-out for builtin")
    sequences: StrictInt = Field(
        default=16, ge=2, description="number of sequences; errors need two"
    )
    examples: StrictInt = Field(
        default=1000, ge=2, description="number of labelled examples; classifiers only"
    )


def foreign_keys(task: str) -> dict[str, str]:
    """Return the keys of a data section that mean nothing for a task, each with the reason."""
    if task not in CLASSIFIERS:
        reason = f"model.task is {task}, and this is of classifiers"
        return {"examples": f"{reason}; give `sequences`.", "labels": f"{reason}; leave it out."}
    reason = f"model.task is {task}, and this is of language models"
    found = {
        "sequences": f"{reason}; give `examples`.",
        "packing": f"{reason}; leave it out.",
        "answers_only": f"{reason}; leave it out.",
    }
    if task == IMAGES:
        found["length"] = f"model.task is {task}, and this is of text; leave it out."
    return found


def drop_foreign_keys(data: dict[str, Any], task: str) -> None:
    """Take out of a recipe's plain data what would be refused when it is read again."""
    for section in (data["calibration"], data["held_out"], *data["other_texts"].values()):
        for key in foreign_keys(task):
            del section[key]
    if task in CLASSIFIERS:
        del data["sensitivity"]["curvature"]["length"]
    if task == IMAGES and "spectrum" in data:
        del data["spectrum"]["length"]


def with_task_defaults(data: Any) -> Any:
    """Return a recipe's raw data with the defaults that depend on the task filled in."""
    if not isinstance(data, dict) or not isinstance(model := data.get("model"), dict | Section):
        return data
    task = model.get("task") if isinstance(model, dict) else getattr(model, "task", None)
    calibration = data.get("calibration", {})
    if task not in CLASSIFIERS or not isinstance(calibration, dict):
        return data
    filled = {"calibration": {"withheld": WITHHELD_EXAMPLES} | calibration}
    return {"export": CLASSIFIER_EXPORTS} | data | filled
