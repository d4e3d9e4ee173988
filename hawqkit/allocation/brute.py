"""The exhaustive solver: the oracle of the exact one. Plain loops over everything there is."""

from __future__ import annotations

import itertools
import math

import numpy as np

from hawqkit.allocation.problem import Problem
from hawqkit.errors import BudgetError, InputError
from hawqkit.records import Integers

MOST_MIXES = 2_000_000


def solve_by_enumeration(problem: Problem) -> tuple[Integers, float]:
    """Try every mix; return the first of smallest summed score, and that score in nats.

    Raises:
        InputError: there are more than two million mixes.
        BudgetError: none of them meets the budgets.
    """
    columns = [np.flatnonzero(row).tolist() for row in problem.allowed]
    count = math.prod(map(len, columns))
    if count > MOST_MIXES:
        raise InputError(
            f"{count:,} mixes are too many to try one by one (at most {MOST_MIXES:,}): use "
            "exact.solve."
        )
    best: tuple[float, tuple[int, ...]] | None = None
    for mix in itertools.product(*columns):
        if not _within(problem, mix):
            continue
        score = math.fsum(float(problem.scores[g, f]) for g, f in enumerate(mix))
        if best is None or score < best[0]:
            best = (score, mix)
    if best is None:
        raise BudgetError(f"none of the {count:,} mixes meets the budgets.")
    return np.array(best[1], dtype=np.int64), best[0]


def _within(problem: Problem, mix: tuple[int, ...]) -> bool:
    for resource in problem.resources:
        if resource.exact is not None:
            used = resource.exact(problem.mix(np.array(mix)))
        else:
            used = resource.fixed + sum(int(resource.costs[g, f]) for g, f in enumerate(mix))
        if used > resource.limit:
            return False
    return True
