"""Whether interactions between layers enter a choice, and how. No torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hawqkit.allocation import Allocated, Problem, mix_totals
from hawqkit.allocation.exact import Solution, solve
from hawqkit.allocation.interactions import refine
from hawqkit.allocation.resources import SizeTable
from hawqkit.errors import InputError
from hawqkit.records import Floats, Integers, Samples, Sensitivities
from hawqkit.sensitivity.layer_interactions import SHARE, interactions_of

AUTO = "auto"
MOST_CELLS = 4096  # pairs of a layer and a format: their products take 128 MB, some copies of which


def share_of(
    sensitivities: Sensitivities, asked: str | bool, score: str, *, limits_kl: bool
) -> float:
    """Return how much of the interactions enters the choice, 0 for none.

    `auto` takes them for classifiers and other networks of single examples, whose layers interact
    most, where the probe's best score chooses and nothing stands against it; a score that was asked
    for by name chooses as it was published.

    Raises:
        InputError: they were asked for, and there are no samples, a limit on the KL, or too many
            pairs of layers and formats.
    """
    if asked is False:
        return 0.0
    against = _against(sensitivities, limits_kl)
    if asked is True:
        if against:
            raise InputError(f"interactions cannot enter this choice: {against}; leave them out.")
        return SHARE
    good = score == AUTO and sensitivities.data.by_example
    return SHARE if good and not against else 0.0


def _against(sensitivities: Sensitivities, limits_kl: bool) -> str:
    """Return why interactions cannot enter a choice, nothing if they can."""
    if sensitivities.samples is None:
        return "this table has none of the probe's samples"
    if limits_kl:
        return "max_predicted_kl searches sizes by sums over layers"
    cells = len(sensitivities.layers) * len(sensitivities.formats)
    if cells > MOST_CELLS:
        return (
            f"{len(sensitivities.layers)} layers in {len(sensitivities.formats)} formats are "
            f"{cells:,} pairs, and products are taken of at most {MOST_CELLS:,}"
        )
    return ""


def solved(
    problem: Problem,
    samples: Samples | None,
    share: float,
    rows: Integers | None = None,
    weights: Floats | None = None,
) -> Solution:
    """Return the solution of a problem, with interactions if there is a share of them.

    Args:
        problem: the table and the budgets.
        samples: of the probe, needed for interactions.
        share: see `share_of`.
        rows: the examples that choose, default all that are not withheld.
        weights: (S,) multiplicity of each.
    """
    start = solve(problem)
    if share == 0.0 or samples is None:
        return start
    rows = np.flatnonzero(samples.withheld == 0) if rows is None else rows
    return refine(problem, start, interactions_of(samples, problem.groups, rows, weights, share))


def with_interactions(
    found: Allocated, samples: Samples | None, share: float, tables: tuple[SizeTable, ...]
) -> Allocated:
    """Return what was allocated, improved with interactions if there is a share of them."""
    if share == 0.0:
        return found
    solution = solved(found.problem, samples, share)
    totals = mix_totals(found.problem, solution.choice, tables)
    mix = found.problem.mix(solution.choice)
    return replace(found, layers=mix, solution=solution, totals=totals)
