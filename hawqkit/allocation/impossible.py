"""What to say when no mix meets the budgets."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from hawqkit.allocation.problem import Problem, Resource, largest_choice, smallest_choice
from hawqkit.allocation.program import run_program
from hawqkit.allocation.relaxation import reduce_problem
from hawqkit.errors import BudgetError

_WHAT_TO_DO = "Raise the budget or add narrower formats."


def check_budgets(problem: Problem) -> None:
    """Refuse every budget that not even the smallest formats meet.

    Raises:
        BudgetError: names each such budget, what came, and the smallest and largest to be had.
    """
    problems = []
    for resource in problem.resources:
        small = resource.used(smallest_choice(problem, resource.costs))
        if small <= resource.limit:
            continue
        large = resource.used(largest_choice(problem, resource.costs))
        problems.append(
            f"budget {_asked(resource)} cannot be met: with the formats "
            f"{', '.join(problem.formats)} these {len(problem.layers)} layers take at least "
            f"{resource.figure(small)} and at most {resource.figure(large)}."
        )
    if problems:
        raise BudgetError("\n".join([*problems, _WHAT_TO_DO]))


def contradiction(problem: Problem) -> BudgetError:
    """Return the error for budgets that can be met one by one, but not together."""
    for first, second in itertools.combinations(problem.resources, 2):
        low_first, low_second = _least(problem, first, second), _least(problem, second, first)
        if low_first > first.limit or low_second > second.limit:
            return BudgetError(
                f"budgets {_asked(first)} and {_asked(second)} contradict each other: each can be "
                f"met alone, but within {_asked(second)} the smallest {first.name} is "
                f"{first.figure(low_first)}, and within {_asked(first)} the smallest "
                f"{second.name} is {second.figure(low_second)}. Raise one of them to that."
            )
    every = ", ".join(map(_asked, problem.resources))
    return BudgetError(
        f"budgets {every} contradict each other: any two of them can be met, but not all at once. "
        "Raise one of them."
    )


def overhead(problem: Problem, excess: list[int]) -> BudgetError:
    """Return the error for a size that only the files' headers exceed."""
    over = [(r, e) for r, e in zip(problem.resources, excess, strict=True) if e > 0]
    what = "; ".join(
        f"budget {_asked(r)}: the nearest mix takes {r.figure(r.limit + e)}" for r, e in over
    )
    return BudgetError(
        f"{what}, headers included, and no smaller one was found. Raise the budget to that."
    )


def _asked(resource: Resource) -> str:
    if resource.unit == "bytes":
        return f"{resource.name} = {resource.limit:,} bytes"
    return f"{resource.name} = {resource.asked:g}"


def _least(problem: Problem, wanted: Resource, within: Resource) -> int:
    """Return the smallest amount of one resource among mixes that keep to another."""
    pair = replace(problem, resources=(wanted, within))
    knapsack = reduce_problem(pair, [wanted.limit, within.limit])
    amounts = np.where(knapsack.kept, knapsack.costs[0], np.inf)
    alone = replace(knapsack, scores=amounts, costs=knapsack.costs[1:], slack=knapsack.slack[1:])
    outcome = run_program(alone, about=float(np.where(knapsack.kept, amounts, 0.0).max()))
    assert outcome.choice is not None, "each budget was found possible by itself"
    return wanted.used(outcome.choice)
