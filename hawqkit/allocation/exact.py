"""The best allocation within all budgets, with a proof that there is no better one.

    minimize    sum over g of score[g, f_g]
    subject to  fixed_r + sum over g of cost_r[g, f_g] <= limit_r      for every budget r

a multiple-choice knapsack (Kellerer, Pferschy, Pisinger 2004, chapter 11). HiGHS solves what the
Lagrangian bound leaves of it; budgets are recounted in integers afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from hawqkit.allocation.impossible import check_budgets, contradiction, overhead
from hawqkit.allocation.problem import Problem
from hawqkit.allocation.program import SOLVER, run_program
from hawqkit.allocation.relaxation import (
    Knapsack,
    drop_idle_limits,
    improve,
    lagrangian_bound,
    reduce_problem,
    relax,
    round_shares,
    rule_out,
    score_scale,
)
from hawqkit.records import Certificate, Integers

# Headers of a few bytes are met in one or two rounds; from the fifth on the step doubles.
_ROUNDS = 24
_PLAIN_ROUNDS = 4


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """A choice of columns (G,), its summed score in nats, and the proof."""

    choice: Integers
    objective: float
    certificate: Certificate


def solve(problem: Problem, *, gap: float = 0.0, time_limit: float | None = None) -> Solution:
    """Return the mix of smallest summed score within every budget.

    Scores are scaled to a sum of 1e6 before HiGHS sees them. Every budget is recounted in integers
    from the chosen formats, `size` as the true bytes of the mix; on an excess the limit is lowered
    by it and the problem solved again. The certificate's bound belongs to the limits as asked, so a
    gap that such a step opens is reported. Of equal cells in a group the cheapest, of equal groups
    the earlier one gets the wider format: equal input gives equal output.

    Args:
        problem: the table and the budgets.
        gap: relative gap at which HiGHS may stop; 0 asks for the optimum.
        time_limit: seconds for HiGHS; the certificate says when it was reached.

    Raises:
        BudgetError: no mix meets the budgets; says what can be had.
    """
    check_budgets(problem)
    limits = [resource.limit for resource in problem.resources]
    excess = [0] * len(limits)
    bound: float | None = None
    for attempt in range(_ROUNDS):
        found = _solve_within(problem, limits, gap, time_limit)
        if found is None:
            raise contradiction(problem) if bound is None else overhead(problem, excess)
        bound = found.bound if bound is None else bound
        choice = _settle_equal_groups(problem, found.choice)
        excess = problem.excess(choice)
        if all(e <= 0 for e in excess):
            lowered = [r.limit - limit for r, limit in zip(problem.resources, limits, strict=True)]
            status = "time limit"
            if found.finished:
                status = "optimal" if gap == 0.0 else f"optimal within a gap of {gap:g}"
            return _certified(problem, choice, bound, status, lowered)
        step = 2 ** max(0, attempt - _PLAIN_ROUNDS)
        limits = [limit - step * max(e, 0) for limit, e in zip(limits, excess, strict=True)]
    raise overhead(problem, excess)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    choice: Integers
    bound: float
    finished: bool


def _solve_within(
    problem: Problem, limits: list[int], gap: float, time_limit: float | None
) -> _Found | None:
    knapsack = reduce_problem(problem, limits)
    if (knapsack.slack < 0).any():
        return None
    knapsack = drop_idle_limits(knapsack)
    relaxation = relax(knapsack)
    if relaxation is None:
        return None
    bound, _ = lagrangian_bound(knapsack, relaxation.multipliers)
    known = round_shares(knapsack, relaxation)
    if known is not None:
        knapsack = rule_out(knapsack, relaxation.multipliers, known)
        known = improve(knapsack, known)
        knapsack = rule_out(knapsack, relaxation.multipliers, known)
        if knapsack.kept.sum() == len(known):  # every other cell is proven worse
            return _Found(known, knapsack.score(known), finished=True)
    else:
        # Without a mix the scale is a guess, and cells that matter may be far below it: HiGHS's
        # first mix sets the scale and the cells of the second run.
        about = 1e6 / score_scale(knapsack)
        known = run_program(knapsack, about=about, gap=gap, time_limit=time_limit).choice
        if known is None:
            return None
        knapsack = rule_out(knapsack, relaxation.multipliers, known)
    about = knapsack.score(known)
    outcome = run_program(knapsack, about=about, gap=gap, time_limit=time_limit)
    if outcome.choice is None:  # a time limit; `known` stands, and its bound is the relaxation's
        return _Found(known, max(bound, outcome.bound), outcome.finished)
    choice = _better(knapsack, outcome.choice, known)
    return _Found(choice, outcome.bound, outcome.finished)


def _better(knapsack: Knapsack, found: Integers, known: Integers) -> Integers:
    """Return HiGHS's mix, unless the one known before is lower by more than rounding."""
    lower = knapsack.score(known) < knapsack.score(found) * (1.0 - 1e-12)
    return known if lower else found


def _settle_equal_groups(problem: Problem, choice: Integers) -> Integers:
    """Among groups equal in every number, give the costlier formats to the earlier ones."""
    alike: dict[bytes, list[int]] = defaultdict(list)
    for index in range(len(problem.groups)):
        row = [
            problem.scores[index].tobytes(),
            *(r.costs[index].tobytes() for r in problem.resources),
        ]
        alike[b"".join(row)].append(index)
    settled = choice.copy()
    for members in alike.values():
        columns = choice[members].tolist()
        cost = [tuple(int(r.costs[members[0], c]) for r in problem.resources) for c in columns]
        order = sorted(range(len(columns)), key=lambda i: (cost[i], columns[i]), reverse=True)
        settled[members] = [columns[i] for i in order]
    return settled


def _certified(
    problem: Problem, choice: Integers, bound: float, status: str, lowered: list[int]
) -> Solution:
    objective = problem.objective(choice)
    bound = min(bound, objective)
    steps = [
        f"{r.name} lowered by {r.step(by)}"
        for r, by in zip(problem.resources, lowered, strict=True)
        if by > 0
    ]
    certificate = Certificate(
        solver=SOLVER,
        status="; ".join([status, *steps]),
        objective=objective,
        bound=bound,
        relative_gap=(objective - bound) / objective if objective > 0.0 else 0.0,
        groups=len(problem.groups),
        variables=int(problem.allowed.sum()),
    )
    return Solution(np.asarray(choice, dtype=np.int64), objective, certificate)
