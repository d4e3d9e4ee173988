"""From sensitivities to the allocation: solve, predict, cross-fit, resample, compare. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from hawqkit.allocation import (
    Allocated,
    SizeTable,
    allocate_table,
    make_baselines,
    sweep_frontier,
)
from hawqkit.allocation.resources import LATENCY
from hawqkit.errors import InputError
from hawqkit.formats import with_activations
from hawqkit.pipeline.folder import RunFolder
from hawqkit.pipeline.interacting import AUTO, share_of, with_interactions
from hawqkit.pipeline.kernels import kernel_cells, kernel_warnings
from hawqkit.pipeline.kl_limit import find_smallest
from hawqkit.pipeline.latency import latency_costs
from hawqkit.pipeline.resampling import indivisible, stability, with_cross_fit
from hawqkit.pipeline.risk import compare_risk, risked
from hawqkit.records import (
    Allocation,
    Floats,
    Frontier,
    KlBudget,
    Layer,
    Mix,
    ModelFacts,
    Prediction,
    Samples,
    Sensitivities,
    to_array,
)
from hawqkit.sensitivity.confidence import MAX_PREDICTED_KL, KlLimit
from hawqkit.sensitivity.curvature_scores import (
    lacking,
)
from hawqkit.sensitivity.prediction import predict
from hawqkit.sensitivity.scores import (
    resolve_score,
)
from hawqkit.store import write_record
from hawqkit.targets import find_target


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """How to choose.

    Attributes:
        budgets: `average_bits`, `bits_per_weight`, `size` (bytes), `bops`, `latency_ms` -> limit.
        max_predicted_kl: asks for the smallest mix within this limit on the predicted KL.
        runtime: profile of layers that share a format.
        score: a score's name, or `auto`.
        risk: standard deviations added to each score.
        targets: targets whose bytes are counted.
        size_target: the one that `size` limits.
        baselines: other mixes to set beside the chosen one.
        draws: resampled probes for stability; 0 leaves it out.
        seed: of the resampling.
        latency_table: file that says how long each layer takes in each format.
        groups: layer name -> key; layers with the same key share a format, whatever the runtime.
        interactions: whether what layers do together enters the choice; `auto`, see `share_of`.
    """

    budgets: Mapping[str, float]
    runtime: str = "transformers"
    score: str = "auto"
    risk: float = 0.0
    targets: Sequence[str] = ()
    size_target: str | None = None
    baselines: Sequence[str] = ()
    draws: int = 0
    seed: int = field(default=0)
    max_predicted_kl: KlLimit | None = None
    latency_table: str | Path | None = None
    groups: Mapping[str, str] = field(default_factory=dict)
    interactions: str | bool = AUTO

    def asked(self) -> dict[str, float]:
        """Return every limit by its name, that on the KL in nats."""
        limit = self.max_predicted_kl
        return {**self.budgets, **({MAX_PREDICTED_KL: limit.value} if limit else {})}


def choose(sensitivities: Sensitivities, settings: ChoiceSettings) -> tuple[Allocation, Frontier]:
    """Solve the allocation and say everything that is known of it.

    Where sequences were withheld, they predict the chosen mix and every baseline; the procedure is
    cross-fitted over all sequences; stability resamples the choosing sequences by document. With
    `max_predicted_kl` all of these are within the size that it led to.

    Raises:
        BudgetError: no mix fits the budgets; says what can be had.
        InputError: a name is unknown, `risk` or a confidence needs what this run lacks, or the
            latency table lacks rows.
        Unsupported: `bops` is limited, and operations were not counted.
    """
    name = _score_name(sensitivities, settings)
    tables = size_tables(
        settings.targets, sensitivities.layers, sensitivities.formats, sensitivities.model
    )
    found, kept = _solve(sensitivities, settings, name, tables)
    share = share_of(
        sensitivities,
        settings.interactions,
        settings.score,
        limits_kl=settings.max_predicted_kl is not None,
    )
    found = with_interactions(found, sensitivities.samples, share, tables)
    baselines, warnings = make_baselines(
        found.problem,
        list(settings.baselines),
        weight_error=_error_table(sensitivities),
        trace_scores=to_array(sensitivities.scores["trace"].values),
        size_tables=tables,
    )
    warnings = (*warnings, *kernel_warnings(sensitivities.formats, settings.runtime))
    other = compare_risk(sensitivities, found, name, settings.risk, tables)
    if settings.draws and indivisible(sensitivities, name):
        warnings = (*warnings, f"stability is not known: {name} was measured in a single shard.")
    prediction = None
    samples: Samples | None = sensitivities.samples
    if samples is not None and sensitivities.withheld:
        predicted = partial(predict, samples, sensitivities.layers, sensitivities.formats)
        prediction = with_cross_fit(
            sensitivities, samples, settings, name, found, predicted(found.layers), share
        )
        baselines = tuple(_foretold(mix, predicted) for mix in baselines)
        if other is not None:
            other = replace(other, mix=_foretold(other.mix, predicted))
    allocation = Allocation(
        layers=found.layers,
        budgets=settings.asked(),
        totals=found.totals,
        runtime=settings.runtime,
        score=name,
        risk=settings.risk,
        objective=found.problem.objective(found.solution.choice),
        certificate=found.solution.certificate,
        prediction=prediction,
        stability=stability(sensitivities, settings, name, found, share),
        interactions=share,
        baselines=baselines,
        model=sensitivities.model.hash,
        sensitivities=sensitivities.fingerprint,
        rounding=sensitivities.rounding,
        loss=sensitivities.loss,
        warnings=warnings,
        kl_budget=kept,
        other_risk=other,
        activations=sensitivities.activations,
    )
    return allocation, sweep_frontier(found.problem, found.solution.choice)


def allocate_run(
    folder: str | Path,
    budgets: Mapping[str, float] | None = None,
    runtime: str | None = None,
    score: str | None = None,
    risk: float | None = None,
    output: str | Path | None = None,
    max_predicted_kl: KlLimit | None = None,
    latency_table: str | Path | None = None,
    interactions: bool | None = None,
) -> Allocation:
    """Choose again from a saved run, without torch; what is not given comes from its recipe.

    Args:
        folder: a run folder that the probe has written.
        budgets: name -> limit of a size; these and `max_predicted_kl` replace all of the recipe's.
        runtime: profile, instead of the recipe's.
        score: score, instead of the recipe's.
        risk: standard deviations, instead of the recipe's.
        output: a file to write the allocation to, instead of the run's own allocation.json.
        max_predicted_kl: the smallest mix within this limit on the predicted KL.
        latency_table: for the limit on `latency_ms`, instead of the recipe's.
        interactions: whether what layers do together enters the choice, instead of the recipe's.
    """
    run = RunFolder(Path(folder))
    settings = recipe_choice(run)
    if budgets or max_predicted_kl:
        limits = dict(budgets or {})
        settings = replace(
            settings,
            budgets=limits,
            max_predicted_kl=max_predicted_kl,
            latency_table=settings.latency_table if LATENCY in limits else None,
        )
    settings = replace(
        settings,
        latency_table=latency_table or settings.latency_table,
        runtime=runtime or settings.runtime,
        score=score or settings.score,
        interactions=settings.interactions if interactions is None else interactions,
        risk=settings.risk if risk is None else risk,
    )
    allocation, frontier = choose(run.read_sensitivities(), settings)
    write_record(Path(output) if output else run.allocation, allocation)
    if output is None:
        write_record(run.frontier, frontier)
    return allocation


def recipe_choice(run: RunFolder) -> ChoiceSettings:
    """Return how a run's recipe says to choose."""
    recipe = run.read_recipe()
    counts = recipe.budget.size is not None or recipe.size_target is not None
    return ChoiceSettings(
        budgets=recipe.budget.limits(),
        max_predicted_kl=recipe.budget.kl_limit(),
        latency_table=recipe.budget.latency_table(),
        runtime=recipe.runtime,
        score=recipe.sensitivity.score,
        interactions=recipe.sensitivity.interactions,
        risk=recipe.sensitivity.risk,
        targets=tuple(
            dict.fromkeys((*recipe.export, *([recipe.counted_target()] if counts else [])))
        ),
        size_target=recipe.counted_target() if counts else None,
        baselines=recipe.validation.baselines,
        draws=recipe.stability.draws,
        seed=recipe.sensitivity.seed,
    )


def size_tables(
    targets: Sequence[str], layers: Sequence[Layer], formats: Sequence[str], facts: ModelFacts
) -> tuple[SizeTable, ...]:
    """Return the byte tables of those targets that have files of a size worth counting."""
    tables = []
    for name in targets:
        target = find_target(name)
        if target.SIZED:
            costs, fixed = target.size_table(layers, formats, facts)
            exact = partial(_exact_size, name, tuple(layers), facts)
            tables.append(SizeTable(name, costs, fixed, exact))
    return tuple(tables)


def _exact_size(
    target: str, layers: tuple[Layer, ...], facts: ModelFacts, mix: Mapping[str, str]
) -> int:
    return int(find_target(target).size(mix, layers, facts))


def _error_table(sensitivities: Sensitivities) -> Floats:
    """Return what the baseline `weight-error` minimizes: |dW|^2, and that of inputs beside it.

    Where formats round inputs, the score has the two in one unit, nats.
    """
    if not with_activations(sensitivities.formats):
        return to_array(sensitivities.weight_error)
    return to_array(sensitivities.scores["weight-error"].values)


def _score_name(sensitivities: Sensitivities, settings: ChoiceSettings) -> str:
    name = resolve_score(settings.score, sensitivities.auto)
    if name not in sensitivities.scores:
        raise InputError(lacking(name, sensitivities))
    return name


def _solve(
    sensitivities: Sensitivities,
    settings: ChoiceSettings,
    name: str,
    tables: Sequence[SizeTable],
) -> tuple[Allocated, KlBudget | None]:
    table = risked(sensitivities, name, settings.risk)
    costs = latency_costs(
        settings.budgets, settings.latency_table, sensitivities.layers, sensitivities.formats
    )
    available = kernel_cells(len(sensitivities.layers), sensitivities.formats, settings.runtime)
    limit = settings.max_predicted_kl
    if limit is not None:
        return find_smallest(
            sensitivities,
            limit,
            name,
            table,
            budgets=settings.budgets,
            runtime=settings.runtime,
            size_tables=tables,
            size_target=settings.size_target,
            groups=settings.groups,
            costs=costs,
            available=available,
        )
    found = allocate_table(
        sensitivities.layers,
        sensitivities.formats,
        table,
        budgets=settings.budgets,
        runtime=settings.runtime,
        size_tables=tables,
        size_target=settings.size_target,
        groups=settings.groups,
        costs=costs,
        available=available,
    )
    return found, None


def _foretold(mix: Mix, predicted: Callable[[Mapping[str, str]], Prediction]) -> Mix:
    return replace(mix, prediction=predicted(mix.layers))
