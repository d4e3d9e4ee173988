"""The schema of a recipe: everything that a run can be told."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    model_validator,
)

from hawqkit.recipe.consistency import contradictions
from hawqkit.recipe.data_sections import (
    CalibrationSection,
    HeldOutSection,
    ModelSection,
    Section,
    drop_foreign_keys,
    with_task_defaults,
)
from hawqkit.recipe.document import show_path, write_yaml
from hawqkit.recipe.tuning_section import TuneSection, drop_foreign_tune_keys
from hawqkit.recipe.values import (
    SIZED_TARGETS,
    CurvatureScoreName,
    FormatName,
    LayerChoice,
    Milliseconds,
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
    distinct_formats,
    distinct_numbers,
    is_sized,
    parse_kl_limit,
    parse_latency,
)
from hawqkit.records.activations import DYNAMIC
from hawqkit.sensitivity.confidence import DEFAULT_CONFIDENCE, MAX_PREDICTED_KL, KlLimit
from hawqkit.sensitivity.curvature_scores import CURVATURE_SCORES


class LayersSection(Section):
    """Which layers are measured and quantized."""

    include: tuple[NonEmpty, ...] = Field(
        default=("*",), min_length=1, description="patterns of names"
    )
    exclude: tuple[NonEmpty, ...] = Field(
        default=("lm_head",),
        description="patterns of names to leave; the default need not match anything",
    )
    misfits: Literal["refuse", "skip", "partial"] = Field(
        default="refuse",
        description="a layer whose columns some formats do not divide: an error, left out, or with "
        "the formats that fit",
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
                f"{self.shards} shards need `sequences` of at least as many, and it is "
                f"{self.sequences}; use fewer shards, or raise it."
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
    interactions: StrictBool | Literal["auto"] = Field(
        default="auto",
        description="whether what layers do together enters the choice; auto: for classifiers",
    )
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


class ActivationsSection(Section):
    """How the inputs of layers are quantized, where a format has bits for them."""

    mode: Literal["static", "dynamic"] = Field(
        default="static",
        description="static: one range for all inputs of a layer; dynamic: one for each token",
    )
    observer: Literal["min-max", "percentile", "mse", "entropy"] = Field(
        default="mse", description="how a static range is found on the calibration data"
    )
    percentile: Annotated[float, Field(strict=True, gt=50, le=100)] | None = Field(
        default=None,
        description="of the entries, for observer: percentile; 99.9 where it is not said",
    )
    symmetric: StrictBool = Field(
        default=False, description="ranges as wide below 0 as above, where inputs go below it"
    )

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        if self.mode == DYNAMIC and "observer" in self.model_fields_set:
            raise ValueError(
                "mode dynamic makes a range of each token itself, and an observer finds static "
                "ones; leave the observer out, or use mode: static."
            )
        if self.percentile is not None and self.observer != "percentile":
            raise ValueError("percentile is of observer: percentile; add that, or leave this out.")
        return self


class KlLimitSection(Section):
    """A limit on the predicted KL, and how sure it must hold."""

    value: Positive = Field(description="nats, the mean over predictions")
    confidence: Number = Field(
        default=DEFAULT_CONFIDENCE,
        ge=0.5,
        lt=1,
        description="that the KL stays below; 0.5 limits the prediction itself",
    )


class LatencySection(Section):
    """A limit on the time of a run, and the measured table that says what each layer takes."""

    limit: Milliseconds = Field(description="3.1ms, 850us, or a number of milliseconds")
    table: NonEmpty | None = Field(
        default=None, description="CSV file with the columns layer or shape, format, milliseconds"
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
    bops: Positive | None = Field(
        default=None,
        description="multiply-accumulates x weight bits x activation bits, of one example",
    )
    latency: Annotated[
        LatencySection | None,
        BeforeValidator(parse_latency, json_schema_input_type=float | str | LatencySection | None),
    ] = Field(
        default=None,
        description="time of a run, as in latency: {limit: 3.1ms, table: latency.csv}",
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
        """Return the limits on what a mix takes that are set, by name.

        `size` is in bytes, and the limit of `latency` is called `latency_ms`.
        """
        taken = self.model_dump(exclude={MAX_PREDICTED_KL, "latency"})
        if self.latency is not None:
            taken["latency_ms"] = self.latency.limit
        return {k: v for k, v in taken.items() if v is not None}

    def latency_table(self) -> str | None:
        """Return the file that says how long each layer takes, if one is named."""
        return None if self.latency is None else self.latency.table

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
    formats: Annotated[
        tuple[FormatName, ...], Field(min_length=1), AfterValidator(distinct_formats)
    ] = Field(description="formats to choose from, as in formats: [int3-g64, int4-g64, int8-g64]")
    sensitivity: SensitivitySection = SensitivitySection()
    activations: ActivationsSection | None = Field(
        default=None,
        description="how inputs are quantized, for formats such as w4a8 or int4-g64-a8",
    )
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
    tune: TuneSection | None = Field(
        default=None, description="train the chosen mix; left out, a run does not"
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_task(cls, data: Any) -> Any:
        return with_task_defaults(data)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = contradictions({name: getattr(self, name) for name in type(self).model_fields})
        if found:
            raise ValueError("; ".join(f"{show_path(path)}: {text}" for path, text in found))
        return self

    def counted_target(self) -> str:
        """Return the target whose bytes `size` counts: as asked, or the first that has a size."""
        sized = [name for name in self.export if is_sized(name)]
        return self.size_target or (sized[0] if sized else SIZED_TARGETS[0])

    def resolved_yaml(self) -> str:
        """Return the recipe with every default written out; reading it gives an equal recipe."""
        data = self.model_dump(mode="json", by_alias=True)
        if self.spectrum is None:
            del data["spectrum"]  # a stage that is not asked for, not a stage with defaults
        if self.tune is None:
            del data["tune"]
        else:
            drop_foreign_tune_keys(data["tune"], self.model.task)
        if self.activations is None:
            del data["activations"]  # refused where no format rounds inputs
        elif self.activations.mode == DYNAMIC:
            del data["activations"]["observer"]  # refused when it is read again
        drop_foreign_keys(data, self.model.task)
        return write_yaml(data)


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def schema_text() -> str:
    """Return `recipe.schema.json` as it is shipped."""
    return json.dumps(recipe_schema(), indent=2) + "\n"
