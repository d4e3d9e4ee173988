"""The schema of a recipe: everything that a run can be told."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from hawqkit.recipe.consistency import BUILTIN, contradictions
from hawqkit.recipe.document import show_path, write_yaml
from hawqkit.recipe.values import (
    SIZED_TARGETS,
    CurvatureScoreName,
    Device,
    FormatName,
    LayerChoice,
    NonEmpty,
    Number,
    Positive,
    RuntimeName,
    ScoreName,
    Size,
    SizedTargetName,
    TargetName,
    TextName,
    distinct,
    distinct_numbers,
    parse_kl_limit,
)
from hawqkit.sensitivity.confidence import DEFAULT_CONFIDENCE, MAX_PREDICTED_KL, KlLimit
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES


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
    task: Literal["causal-lm"] = Field(default="causal-lm", description="what the model predicts")


class TextSection(Section):
    """A text, and how it is cut into sequences."""

    source: NonEmpty = Field(
        default=BUILTIN,
        description="builtin, a .txt, .jsonl or .parquet file, or a data set's hub id",
    )
    split: NonEmpty = Field(
        default="calibration", description="calibration or held-out for builtin"
    )
    config: StrictStr | None = Field(default=None, description="configuration of a data set")
    column: StrictStr | None = Field(
        default=None, description="column that holds the text or messages"
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
    length: StrictInt = Field(default=256, ge=2, description="tokens of a sequence")
    seed: StrictInt = Field(default=0, ge=0, description="seed of the choice of windows")


class CalibrationSection(TextSection):
    """The text that measures sensitivities."""

    withheld: StrictInt = Field(
        default=32,
        ge=0,
        description="more sequences, which the choice never sees: they predict its loss",
    )


class HeldOutSection(TextSection):
    """A text on which validation measures; the choice never sees it."""

    split: NonEmpty = Field(default="held-out", description="calibration or held-out for builtin")
    sequences: StrictInt = Field(
        default=16, ge=2, description="number of sequences; errors need two"
    )


class LayersSection(Section):
    """Which layers are measured and quantized."""

    include: tuple[NonEmpty, ...] = Field(
        default=("*",), min_length=1, description="patterns of names"
    )
    exclude: tuple[NonEmpty, ...] = Field(
        default=("lm_head",),
        description="patterns of names to leave; the default need not match anything",
    )
    misfits: Literal["refuse", "skip"] = Field(
        default="refuse", description="a layer whose columns a group size does not divide"
    )


class CurvatureSection(Section):
    """What the scores of the true Hessian may cost; used where one of them is asked for."""

    sequences: StrictInt = Field(
        default=4, ge=1, description="of the calibration sequences that choose, the first so many"
    )
    length: StrictInt = Field(default=64, ge=2, description="tokens that each of them is cut to")
    shards: StrictInt = Field(
        default=4, ge=1, description="parts of them, measured one by one; errors over text need two"
    )
    relative_error: Positive = Field(
        default=0.1, description="of a trace's standard error and an eigenvalue's residual"
    )
    max_probes: StrictInt = Field(
        default=4, ge=2, description="random vectors of a layer's trace in a shard, at most"
    )
    max_products: StrictInt = Field(
        default=32, ge=2, description="products of a layer's eigenvalue in a shard, at most"
    )

    @model_validator(mode="after")
    def _sequences_for_shards(self) -> Self:
        if self.shards > self.sequences:
            raise ValueError(
                f"{self.shards} shards need as many sequences, and there are {self.sequences}; use "
                "fewer shards or more sequences."
            )
        return self


class SensitivitySection(Section):
    """How sensitivities are measured and which score decides."""

    score: ScoreName = Field(default="auto", description="which prediction of the loss decides")
    batch: Annotated[StrictInt, Field(ge=1)] | Literal["auto"] = Field(
        default="auto", description="sequences of a micro-batch; the numbers don't depend on it"
    )
    checkpointing: StrictBool = Field(
        default=False, description="trade time for memory; equal numbers"
    )
    cache: Literal["auto", "codes", "none"] = Field(
        default="auto", description="keep the codes of all formats, or make them layer by layer"
    )
    positions: StrictInt = Field(
        default=16, ge=0, description="sampled positions a sequence; 0 leaves the token scores out"
    )
    seed: StrictInt = Field(default=0, ge=0, description="seed of the labels that the model draws")
    risk: Number = Field(default=0.0, ge=0, description="standard deviations added to every score")
    also: Annotated[tuple[CurvatureScoreName, ...], AfterValidator(distinct)] = Field(
        default=(),
        description="scores of the true Hessian to measure beside the one that decides",
    )
    curvature: CurvatureSection = Field(
        default=CurvatureSection(), description="what the scores of the true Hessian may cost"
    )

    def curvature_scores(self) -> tuple[str, ...]:
        """Return the scores of the true Hessian that are measured: as decider, or beside it."""
        return tuple(n for n in CURVATURE_SCORES if n == self.score or n in self.also)


class KlLimitSection(Section):
    """A limit on the predicted KL, and how sure it must hold."""

    value: Positive = Field(description="nats, the mean over predictions")
    confidence: Number = Field(
        default=DEFAULT_CONFIDENCE,
        ge=0.5,
        lt=1,
        description="that the KL stays below; 0.5 limits the prediction itself",
    )


class BudgetSection(Section):
    """What the chosen mix may take; several limits hold together."""

    average_bits: Positive | None = Field(
        default=None, description="bits of the codes, mean over entries"
    )
    bits_per_weight: Positive | None = Field(
        default=None, description="the same with scales and padding"
    )
    size: Size | None = Field(
        default=None, description="bytes of the files: 80MB, 0.5GiB, or a number"
    )
    max_predicted_kl: Annotated[
        KlLimitSection | None,
        BeforeValidator(parse_kl_limit, json_schema_input_type=float | str | KlLimitSection | None),
    ] = Field(
        default=None,
        description="the smallest mix whose predicted KL stays below: 0.05, 0.05@0.9, or a mapping",
    )

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.limits() and self.max_predicted_kl is None:
            raise ValueError(
                "names no limit; a recipe needs at least one of "
                f"{', '.join(type(self).model_fields)}, like budget: {{average_bits: 4.0}}."
            )
        return self

    def limits(self) -> dict[str, float]:
        """Return the limits on what a mix takes that are set, by name; `size` in bytes."""
        taken = self.model_dump(exclude={MAX_PREDICTED_KL})
        return {k: v for k, v in taken.items() if v is not None}

    def kl_limit(self) -> KlLimit | None:
        """Return the limit on the predicted KL, if one is set."""
        limit = self.max_predicted_kl
        return None if limit is None else KlLimit(limit.value, limit.confidence)


class ValidateSection(Section):
    """What validation measures beside the chosen mix."""

    baselines: Annotated[
        tuple[Literal["uniform", "ends", "weight-error", "hawq-v2"], ...], AfterValidator(distinct)
    ] = Field(
        default=("uniform", "ends", "weight-error", "hawq-v2"),
        description="other mixes within the same budget",
    )


class StabilitySection(Section):
    """How often the choice would come out the same."""

    draws: StrictInt = Field(
        default=32, ge=0, description="resampled probes; 0 leaves stability out"
    )


class SpectrumSection(Section):
    """What is measured of the curvature's spectrum, whole and layer by layer."""

    kind: Literal["gauss-newton", "hessian"] = Field(
        default="gauss-newton",
        description="gauss-newton has no negative eigenvalues; hessian shows them",
    )
    layers: LayerChoice = Field(
        default="top-8",
        description="all, top-N (the N layers of largest trace), or patterns of names",
    )
    whole: StrictBool = Field(
        default=True, alias="global", description="also the matrix over all parameters"
    )
    top: StrictInt = Field(
        default=10, ge=0, description="eigenpairs that are found one by one; 0 for none"
    )
    steps: StrictInt = Field(default=60, ge=1, description="Lanczos steps of a draw")
    draws: StrictInt = Field(
        default=10, ge=1, description="starting vectors of the quadrature; one gives no error bar"
    )
    eps: Annotated[tuple[Positive, ...], Field(min_length=1), AfterValidator(distinct_numbers)] = (
        Field(
            default=(1e-2, 1e-4, 1e-6),
            description="thresholds of |lambda| for rank and degeneracy, in nats",
        )
    )
    sequences: StrictInt = Field(
        default=8, ge=1, description="sequences of the calibration text; each product reads all"
    )
    length: StrictInt = Field(default=64, ge=2, description="tokens of a sequence")
    seed: StrictInt = Field(default=0, ge=0, description="seed of all random vectors")

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.layers and not self.whole:
            raise ValueError("measures nothing: name layers, or set global: true.")
        return self


class Recipe(Section):
    """Everything a run is told. The key `validate` is the attribute `validation`."""

    model: ModelSection = Field(description="the model, as in model: {source: FOLDER}")
    calibration: CalibrationSection = CalibrationSection()
    held_out: HeldOutSection = HeldOutSection()
    other_texts: dict[TextName, HeldOutSection] = Field(
        default={},
        description="further texts on which validation measures, the shift reported apart",
    )
    layers: LayersSection = LayersSection()
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1), AfterValidator(distinct)] = (
        Field(description="formats to choose from, as in formats: [int3-g64, int4-g64, int8-g64]")
    )
    sensitivity: SensitivitySection = SensitivitySection()
    rounding: Literal["searched", "nearest"] = Field(
        default="searched", description="searched takes the best of a few scales for each group"
    )
    runtime: RuntimeName = Field(
        default="transformers", description="which layers must share a format"
    )
    budget: BudgetSection = Field(description="the limits, as in budget: {average_bits: 4.0}")
    size_target: SizedTargetName | None = Field(
        default=None,
        description="target whose bytes budget.size counts, or max_predicted_kl makes small",
    )
    export: Annotated[tuple[TargetName, ...], AfterValidator(distinct)] = Field(
        default=("compressed-tensors", "bits"), description="targets to write"
    )
    validation: ValidateSection = Field(default=ValidateSection(), alias="validate")
    stability: StabilitySection = StabilitySection()
    spectrum: SpectrumSection | None = Field(
        default=None, description="measure the curvature's spectrum too; left out, it is not"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = contradictions({name: getattr(self, name) for name in type(self).model_fields})
        if found:
            raise ValueError("; ".join(f"{show_path(path)}: {text}" for path, text in found))
        return self

    def counted_target(self) -> str:
        """Return the target whose bytes `size` counts: as asked, or the first that has a size."""
        sized = [name for name in self.export if name in SIZED_TARGETS]
        return self.size_target or (sized[0] if sized else SIZED_TARGETS[0])

    def resolved_yaml(self) -> str:
        """Return the recipe with every default written out; reading it gives an equal recipe."""
        data = self.model_dump(mode="json", by_alias=True)
        if self.spectrum is None:
            del data["spectrum"]  # a stage that is not asked for, not a stage with defaults
        return write_yaml(data)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """Return `recipe.schema.json` as it is shipped."""
    return json.dumps(recipe_schema(), indent=2) + "\n"
