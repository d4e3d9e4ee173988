"""How often each layer keeps its format when the probes are drawn again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hawqkit.allocation.exact import solve
from hawqkit.allocation.problem import Problem, with_scores
from hawqkit.errors import InputError
from hawqkit.records import Floats, Integers

Resample = Callable[[np.random.Generator], Floats]
Choose = Callable[[np.random.Generator], Integers]


def keep_shares(
    problem: Problem,
    choice: Integers,
    resample: Resample,
    *,
    draws: int = 32,
    generator: np.random.Generator,
    gap: float = 0.0,
) -> dict[str, float]:
    """Return layer name -> share of resampled tables in which the layer keeps its format.

    Each table is solved again within the same budgets (to the optimum by default: 32 solves of 210
    layers and 6 formats take well under five seconds).

    Args:
        problem: the problem that was solved.
        choice: (G,) its solution.
        resample: makes one (L, F) table of scores, say from sequences drawn with replacement.
        draws: number of tables.
        generator: source of randomness; handed to `resample`.
        gap: relative gap at which a solve may stop.

    Raises:
        InputError: fewer than one draw.
        NumericalError: a resampled score is negative, NaN or infinite.
    """
    if draws < 1:
        raise InputError(f"draws = {draws}: stability needs at least one.")

    def choose(generator: np.random.Generator) -> Integers:
        return solve(with_scores(problem, resample(generator)), gap=gap).choice

    return shares_of_choices(problem, choice, choose, draws=draws, generator=generator)


def shares_of_choices(
    problem: Problem,
    choice: Integers,
    choose: Choose,
    *,
    draws: int,
    generator: np.random.Generator,
) -> dict[str, float]:
    """Return layer name -> share of `draws` choices in which the layer has the format of `choice`.

    Args:
        problem: the problem that was solved.
        choice: (G,) its solution.
        choose: makes one choice (G,) by the whole procedure, from data drawn again.
        draws: number of choices.
        generator: source of randomness; handed to `choose`.
    """
    same = np.zeros(len(problem.groups), dtype=np.int64)
    for _ in range(draws):
        same += choose(generator) == choice
    shares = {}
    for members, count in zip(problem.groups, same, strict=True):
        for index in members:
            shares[problem.layers[index].name] = int(count) / draws
    return {layer.name: shares[layer.name] for layer in problem.layers}
