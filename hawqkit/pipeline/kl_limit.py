"""`max_predicted_kl`: the smallest mix whose predicted KL stays below a limit. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from hawqkit.allocation import (
    Allocated,
    CostTable,
    SizeTable,
    Smallest,
    Solution,
    make_problem,
    mix_totals,
    solve_smallest,
    stored_resource,
)
from hawqkit.allocation.problem import Booleans
from hawqkit.records import Floats, KlBudget, Sensitivities
from hawqkit.sensitivity.confidence import Forecast, KlLimit, make_forecast


def find_smallest(
    sensitivities: Sensitivities,
    limit: KlLimit,
    name: str,
    table: Floats,
    *,
    budgets: Mapping[str, float],
    runtime: str,
    size_tables: Sequence[SizeTable] = (),
    size_target: str | None = None,
    groups: Mapping[str, str] | None = None,
    costs: Sequence[CostTable] = (),
    available: Booleans | None = None,
) -> tuple[Allocated, KlBudget]:
    """Return the smallest mix that keeps the limit, with every other budget, and the record of it.

    What is made small is the bytes that `size_target` writes, else those of the first target with
    a size, else the stored bits of the layers. Of every size the best mix is found by the score
    that chooses; its KL is predicted from withheld sequences where there are any, so that the
    prediction has not been seen by the choice of the formats, only by that of one number, the size.

    Args:
        sensitivities: the table.
        limit: value and confidence.
        name: the score that chooses.
        table: (L, F) that score, with its risk.
        budgets: other limits; all hold together.
        runtime: profile of layers that share a format.
        size_tables: targets whose bytes are counted.
        size_target: the one that `size` limits.
        groups: layer name -> key; layers with the same key share a format.
        costs: tables of other budgets.
        available: (L, F) False where a layer must not take a format that fits it.

    Raises:
        BudgetError: no mix keeps the limit; says the least KL there is, and what contradicts it.
        InputError: a confidence above 0.5 needs what this run lacks.
    """
    problem = make_problem(
        sensitivities.layers,
        sensitivities.formats,
        table,
        budgets=budgets,
        runtime=runtime,
        size_tables=size_tables,
        size_target=size_target,
        groups=groups,
        costs=costs,
        available=available,
    )
    counted = next((t for t in size_tables if size_target in (None, t.target)), None)
    forecast = make_forecast(sensitivities, name)

    def upper(solution: Solution) -> float:
        return forecast.upper(problem.mix(solution.choice), limit)

    resource = stored_resource(problem, counted)
    found = solve_smallest(problem, resource, upper, limit.value, asked=str(limit))
    mix = problem.mix(found.solution.choice)
    sizes = mix_totals(problem, found.solution.choice, size_tables)
    what = "stored bits" if counted is None else f"bytes of {counted.target}"
    kept = _record(limit, forecast, mix, found, what)
    return Allocated(mix, found.solution, sizes, found.problem), kept


def _record(
    limit: KlLimit, forecast: Forecast, mix: Mapping[str, str], found: Smallest, what: str
) -> KlBudget:
    kl, stderr = forecast.expect(mix)
    amount, score, upper = found.below or (None, None, None)
    return KlBudget(
        value=limit.value,
        confidence=limit.confidence,
        quantile=limit.quantile,
        kl=kl,
        kl_stderr=stderr if math.isfinite(stderr) else None,
        spread=forecast.spread,
        upper=found.loss,
        source=forecast.source,
        sequences=forecast.sequences,
        minimized=what,
        amount=found.amount,
        amount_bound=found.bound,
        score_limit=found.solution.objective,
        smaller_amount=amount,
        smaller_score=score,
        smaller_upper=upper,
        solves=found.solves,
    )
