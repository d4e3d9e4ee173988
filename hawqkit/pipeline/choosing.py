"""From sensitivities to the allocation: solve, predict, cross-fit, resample, compare. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from hawqkit.allocation import (
    Allocated,
    SizeTable,
    allocate_table,
    keep_shares,
    make_baselines,
    sweep_frontier,
)
from hawqkit.errors import InputError
from hawqkit.pipeline.folder import RunFolder
from hawqkit.records import (
    Allocation,
    Floats,
    Frontier,
    Integers,
    Layer,
    ModelFacts,
    Prediction,
    Samples,
    Sensitivities,
    to_array,
)
from hawqkit.sensitivity.participation import participation_ratios
from hawqkit.sensitivity.prediction import cross_fitted, predict
from hawqkit.sensitivity.scores import (
    evaluate,
    evaluate_totals,
    resolve_score,
    sums_of,
    with_risk,
)
from hawqkit.sensitivity.summary import facts_of
from hawqkit.statistics import bootstrap_weights
from hawqkit.store import write_record
from hawqkit.targets import find_target


@dataclass(frozen=True, slots=True)
class ChoiceSettings:
    """How to choose.

    Attributes:
        budgets: `average_bits`, `bits_per_weight`, `size` (bytes) -> limit.
        runtime: profile of layers that share a format.
        score: a score's name, or `auto`.
        risk: standard deviations added to each score.
        targets: targets whose bytes are counted.
        size_target: the one that `size` limits.
        baselines: other mixes to set beside the chosen one.
        draws: resampled probes for stability; 0 leaves it out.
        seed: of the resampling.
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


def choose(sensitivities: Sensitivities, settings: ChoiceSettings) -> tuple[Allocation, Frontier]:
    """Solve the allocation and say everything that is known of it.

    Where sequences were withheld, they predict the chosen mix and every baseline; the procedure is
    cross-fitted over all sequences; stability resamples the choosing sequences by document.

    Raises:
        BudgetError: no mix fits the budgets; says what can be had.
        InputError: a name is unknown, or `risk` needs what this run lacks.
    """
    name = resolve_score(settings.score, sensitivities.auto)
    if name not in sensitivities.scores:
        raise InputError(
            f"score {name!r} is not in this table, which has {', '.join(sensitivities.scores)}; "
            "it was probed with positions 0. Probe again, or choose another score."
        )
    score = sensitivities.scores[name]
    ratios = to_array(sensitivities.participation_ratio)
    table = with_risk(name, to_array(score.values), to_array(score.stderr), ratios, settings.risk)
    tables = size_tables(
        settings.targets, sensitivities.layers, sensitivities.formats, sensitivities.model
    )
    found = _solve(sensitivities, settings, table, tables)
    samples: Samples | None = sensitivities.samples
    baselines, warnings = make_baselines(
        found.problem,
        list(settings.baselines),
        weight_error=to_array(sensitivities.weight_error),
        trace_scores=to_array(sensitivities.scores["trace"].values),
        size_tables=tables,
    )
    prediction = None
    if samples is not None and sensitivities.withheld:
        predicted = partial(predict, samples, sensitivities.layers, sensitivities.formats)
        prediction = _with_cross_fit(
            sensitivities, samples, settings, name, predicted(found.layers)
        )
        baselines = tuple(replace(b, prediction=predicted(b.layers)) for b in baselines)
    stability = {}
    if samples is not None and settings.draws:
        stability = keep_shares(
            found.problem,
            found.solution.choice,
            _resampler(sensitivities, samples, settings, name),
            draws=settings.draws,
            generator=np.random.default_rng(settings.seed),
        )
    allocation = Allocation(
        layers=found.layers,
        budgets=dict(settings.budgets),
        totals=found.totals,
        runtime=settings.runtime,
        score=name,
        risk=settings.risk,
        objective=found.solution.objective,
        certificate=found.solution.certificate,
        prediction=prediction,
        stability=stability,
        baselines=baselines,
        model=sensitivities.model.hash,
        sensitivities=sensitivities.fingerprint,
        rounding=sensitivities.rounding,
        warnings=warnings,
    )
    return allocation, sweep_frontier(found.problem, found.solution.choice)


def allocate_run(
    folder: str | Path,
    budgets: Mapping[str, float] | None = None,
    runtime: str | None = None,
    score: str | None = None,
    risk: float | None = None,
    output: str | Path | None = None,
) -> Allocation:
    """Choose again from a saved run, without torch; what is not given comes from its recipe.

    Args:
        folder: a run folder that the probe has written.
        budgets: name -> limit, instead of the recipe's.
        runtime: profile, instead of the recipe's.
        score: score, instead of the recipe's.
        risk: standard deviations, instead of the recipe's.
        output: a file to write the allocation to, instead of the run's own allocation.json.
    """
    run = RunFolder(Path(folder))
    settings = recipe_choice(run)
    settings = replace(
        settings,
        budgets=dict(budgets) if budgets else settings.budgets,
        runtime=runtime or settings.runtime,
        score=score or settings.score,
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
    return ChoiceSettings(
        budgets=recipe.budget.limits(),
        runtime=recipe.runtime,
        score=recipe.sensitivity.score,
        risk=recipe.sensitivity.risk,
        targets=tuple(
            dict.fromkeys(
                (*recipe.export, *([recipe.counted_target()] if recipe.budget.size else []))
            )
        ),
        size_target=recipe.counted_target() if recipe.budget.size is not None else None,
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


def _solve(
    sensitivities: Sensitivities,
    settings: ChoiceSettings,
    table: Floats,
    tables: Sequence[SizeTable],
) -> Allocated:
    return allocate_table(
        sensitivities.layers,
        sensitivities.formats,
        table,
        budgets=settings.budgets,
        runtime=settings.runtime,
        size_tables=tables,
        size_target=settings.size_target,
    )


def _table_from(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    rows: Integers,
    weights: Floats | None = None,
) -> Floats:
    """Return the table that the procedure would have made of these sequences alone."""
    sums = sums_of(samples, rows, weights)
    facts = facts_of(sensitivities)
    if settings.risk == 0:
        return evaluate_totals(name, sums, facts)
    values, stderr = evaluate(name, sums, facts)
    ratios = participation_ratios(samples)[0]
    return with_risk(name, values, stderr, ratios, settings.risk)


def _with_cross_fit(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    prediction: Prediction,
) -> Prediction:
    def mix_from(rows: Integers) -> Mapping[str, str]:
        table = _table_from(sensitivities, samples, settings, name, rows)
        return _solve(
            sensitivities, settings, table, _needed_tables(sensitivities, settings)
        ).layers

    value, stderr = cross_fitted(samples, sensitivities.layers, sensitivities.formats, mix_from)
    if not np.isfinite([value, stderr]).all():
        return prediction
    return replace(prediction, cross_fitted=value, cross_fitted_stderr=stderr)


def _needed_tables(sensitivities: Sensitivities, settings: ChoiceSettings) -> tuple[SizeTable, ...]:
    """Return byte tables only where bytes are limited; counting them costs time in resamples."""
    if settings.size_target is None:
        return ()
    return size_tables(
        [settings.size_target], sensitivities.layers, sensitivities.formats, sensitivities.model
    )


def _resampler(
    sensitivities: Sensitivities, samples: Samples, settings: ChoiceSettings, name: str
) -> partial[Floats]:
    return partial(_resampled, sensitivities, samples, settings, name)


def _resampled(
    sensitivities: Sensitivities,
    samples: Samples,
    settings: ChoiceSettings,
    name: str,
    generator: np.random.Generator,
) -> Floats:
    rows = np.flatnonzero(samples.withheld == 0)
    weights = bootstrap_weights(samples.document[rows], generator)
    return _table_from(sensitivities, samples, settings, name, rows, weights)
