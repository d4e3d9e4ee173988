"""What to say when no mix meets the budgets."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hawqkit.allocation.problem import Problem, largest_choice, smallest_choice
from hawqkit.allocation.program import run_program
from hawqkit.allocation.relaxation import reduce_problem
from hawqkit.allocation.resources import Resource
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
            f"{', '.join(_formats(problem))} these {len(problem.layers)} layers take at least "
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


@dataclass(frozen=True, slots=True, eq=False)
class Conflict:
    """A budget, and how much of it the limit on the loss takes at least."""

    resource: Resource
    least: int


def unreachable(
    problem: Problem,
    asked: str,
    reached: float,
    formats_reach: float | None,
    conflicts: Sequence[Conflict],
) -> BudgetError:
    """Return the error for a limit on the loss that no mix within the other budgets keeps.

    Args:
        problem: with the other budgets.
        asked: the limit, as in `max_predicted_kl = 0.05`.
        reached: the least loss that was found within the other budgets.
        formats_reach: the least without other budgets, None where that would do.
        conflicts: other budgets that the limit alone exceeds.
    """
    names = ", ".join(_formats(problem))
    if formats_reach is not None:
        return BudgetError(
            f"budget {asked} cannot be met: with the formats {names} the least that these "
            f"{len(problem.layers)} layers reach is {_rounded_up(formats_reach)}. Raise the budget "
            "or add wider formats."
        )
    others = [c.resource for c in conflicts] or list(problem.resources)
    within = " and ".join(map(_asked, others))
    takes = " and ".join(f"{c.resource.name} {c.resource.figure(c.least)}" for c in conflicts)
    return BudgetError(
        f"budgets {asked} and {within} contradict each other: each can be met alone, but within "
        f"{within} the least predicted KL is {_rounded_up(reached)}"
        + (f", and {asked} takes at least {takes}" if takes else "")
        + ". Raise one of them to that."
    )


def _rounded_up(loss: float) -> str:
    """Write a loss with four digits, rounded up so that it can be asked for."""
    if not (math.isfinite(loss) and loss > 0.0):
        return f"{loss:g}"
    unit = 10.0 ** (math.floor(math.log10(loss)) - 3)
    steps = math.ceil(loss / unit)
    return f"{(steps if steps * unit >= loss else steps + 1) * unit:.4g}"


def _asked(resource: Resource) -> str:
    return f"{resource.name} = {resource.limit_figure()}"


def _least(problem: Problem, wanted: Resource, within: Resource) -> int:
    """Return the smallest amount of one resource among mixes that keep to another."""
    pair = replace(problem, resources=(wanted, within))
    knapsack = reduce_problem(pair, [wanted.limit, within.limit])
    amounts = np.where(knapsack.kept, knapsack.costs[0], np.inf)
    alone = replace(knapsack, scores=amounts, costs=knapsack.costs[1:], slack=knapsack.slack[1:])
    outcome = run_program(alone, about=float(np.where(knapsack.kept, amounts, 0.0).max()))
    assert outcome.choice is not None, "each budget was found possible by itself"
    return wanted.used(outcome.choice)


def _formats(problem: Problem) -> list[str]:
    """Return the formats that some layer may take."""
    return [n for column, n in enumerate(problem.formats) if problem.allowed[:, column].any()]
