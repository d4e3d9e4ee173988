"""The smallest mix whose loss stays below a limit: the allocation turned round.

    minimize    bytes(f)
    subject to  loss(f) <= most, and every other budget

where loss(f) may be the summed score itself, or any number that is known of a whole mix, such as
its KL on sequences that took no part in choosing. Let m(B) be the mix of smallest summed score
among those that take at most B (`exact.solve`, with its proof). Then

    there is a mix of at most B bytes with summed score <= T    if and only if    score(m(B)) <= T,

so that the least B for which m(B) holds is the exact answer: no score is rounded, no tolerance of a
solver decides, and of all mixes of that size the one of smallest summed score comes out. Sizes lie
on a grid, and score(m(B)) falls as B grows: a bracket on the grid is closed by interpolating
log loss, which is nearly linear in bits, and halving in turn.

Where the grid is finer than 1e-5 of the size, the search ends at a bracket of that width, and the
gap is reported: to prove that a byte less does not do takes HiGHS minutes (a subset sum), where all
solves down to that width take a second.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from hawqkit.allocation.exact import Solution, solve
from hawqkit.allocation.impossible import Conflict, unreachable
from hawqkit.allocation.problem import Problem, group_costs, size_resource, smallest_choice
from hawqkit.allocation.resources import UNLIMITED, Resource, SizeTable, cost_table
from hawqkit.errors import BudgetError

Loss = Callable[[Solution], float]

WIDTH = 1e-5  # of the size: a bracket that is not narrowed further
_TINY = 1e-12  # a loss of zero has no logarithm


@dataclass(frozen=True, slots=True, eq=False)
class Smallest:
    """The smallest mix that holds, and the proof that no smaller one was overlooked.

    Attributes:
        solution: of smallest summed score among the mixes of at most `amount`, certified.
        problem: as it came, with the size that was found as one more budget.
        resource: what was made small; its limit is `amount`.
        amount: what the mix takes of it, in integers.
        bound: a mix of less than that does not hold; `amount` itself if the grid is coarse.
        loss: of the mix, at most what was asked.
        below: (amount, score, loss) of the best mix that takes less than `bound`; None where the
            smallest mix of all holds.
        solves: allocations that were solved.
    """

    solution: Solution
    problem: Problem
    resource: Resource
    amount: int
    bound: int
    loss: float
    below: tuple[int, float, float] | None
    solves: int


def stored_resource(problem: Problem, table: SizeTable | None = None) -> Resource:
    """Return what a mix takes, without a limit: bytes of a target's files, else stored bits.

    Stored bits are those of `bits_per_weight`: codes, scales, zero points and padding. Of a
    target's bytes the additive part is counted, so that headers, a few bytes, stay outside.
    """
    if table is not None:
        return replace(size_resource(problem, table, UNLIMITED, math.inf), exact=None)
    costs = group_costs(problem, cost_table(problem.layers, problem.formats, "bits_per_weight"))
    entries = sum(layer.numel for layer in problem.layers)
    return Resource("bits_per_weight", costs, 0, UNLIMITED, "bits", entries)


def solve_smallest(
    problem: Problem, resource: Resource, loss: Loss, most: float, *, asked: str
) -> Smallest:
    """Return the mix that takes least of `resource` among those whose loss is at most `most`.

    If `loss` is the summed score, or rises with it, no mix of less than `bound` holds (see the
    module). If it is another number, the result is a mix m(B) that holds while the best one of
    less than `bound`, which is in `below`, does not.

    Args:
        problem: the table and the other budgets, which hold too.
        resource: what to make small, from `stored_resource`.
        loss: of one solution, in nats.
        most: the limit.
        asked: how the limit is called in an error, `max_predicted_kl = 0.05`.

    Raises:
        BudgetError: no mix is found that holds; says the least loss that was found, and which
            budgets contradict each other.
    """
    best = solve(problem)
    reached = loss(best)
    if not reached <= most:
        raise _unreachable(problem, loss, most, reached, asked)
    search = _Search(problem, resource, loss, most)
    high = _Probe(search.index(best), best, reached)
    low: _Probe | None = None
    solves, halve = 1, False
    while high.index - (low.index if low else -1) > search.width(high):
        index = 0 if low is None else search.between(low, high, halve)
        halve = not halve
        probe = search.at(index)
        solves += 1
        if probe.solution is not None and probe.loss <= most:
            # m(B) may take less than B, and is m(B') for every B' from there on.
            high = replace(probe, index=search.index(probe.solution))
        else:
            low = probe
    return search.finish(low, high, solves)


@dataclass(frozen=True, slots=True, eq=False)
class _Probe:
    """A size on the grid and the best mix within it, None where no mix is that small."""

    index: int
    solution: Solution | None
    loss: float


class _Search:
    """Sizes on the grid least + index * step, and the best mix of each."""

    def __init__(self, problem: Problem, resource: Resource, loss: Loss, most: float) -> None:
        self.problem, self.resource, self.loss, self.most = problem, resource, loss, most
        choice = smallest_choice(problem, resource.costs)
        self.least = resource.used(choice)
        floor = resource.costs[np.arange(choice.size), choice][:, None]
        above = np.where(problem.allowed, resource.costs - floor, 0)
        self.step = max(1, int(np.gcd.reduce(above, axis=None)))

    def index(self, solution: Solution) -> int:
        """Return where the size of a mix stands on the grid."""
        return (self.resource.used(solution.choice) - self.least) // self.step

    def width(self, high: _Probe) -> int:
        """Return how many steps of the grid may stay between what holds and what does not."""
        return max(1, int(WIDTH * (self.least + high.index * self.step) / self.step))

    def at(self, index: int) -> _Probe:
        """Return the best mix of at most the size at `index`."""
        try:
            found = solve(self._within(self.least + index * self.step))
        except BudgetError:  # the other budgets leave no mix that is so small
            return _Probe(index, None, math.inf)
        return _Probe(index, found, self.loss(found))

    def between(self, low: _Probe, high: _Probe, halve: bool) -> int:
        """Return an index strictly between the two."""
        share = 0.5
        if not halve and math.isfinite(low.loss):
            over, under = (math.log(max(p.loss, _TINY) / self.most) for p in (low, high))
            share = over / (over - under) if over > under else 0.5
        index = low.index + round(share * (high.index - low.index))
        return min(max(index, low.index + 1), high.index - 1)

    def finish(self, low: _Probe | None, high: _Probe, solves: int) -> Smallest:
        """Return the end of the search: `high` holds, one step below nothing does."""
        assert high.solution is not None, "the first probe that holds has a mix"
        amount = self.least + high.index * self.step
        below = None
        if low is not None and low.solution is not None:
            size = self.resource.used(low.solution.choice)
            below = (size, low.solution.objective, low.loss)
        return Smallest(
            high.solution,
            self._within(amount),
            replace(self.resource, limit=amount),
            amount,
            self.least + ((low.index if low else -1) + 1) * self.step,
            high.loss,
            below,
            solves,
        )

    def _within(self, amount: int) -> Problem:
        resources = (*self.problem.resources, replace(self.resource, limit=amount))
        return replace(self.problem, resources=resources)


def _unreachable(
    problem: Problem, loss: Loss, most: float, reached: float, asked: str
) -> BudgetError:
    """Find out whether the formats or the other budgets are in the way, and say so."""
    conflicts = []
    free = replace(problem, resources=())
    alone = loss(solve(free)) if problem.resources else reached
    for resource in problem.resources if alone <= most else ():
        least = solve_smallest(free, replace(resource, exact=None), loss, most, asked=asked).amount
        if least > resource.limit:
            conflicts.append(Conflict(resource, least))
    return unreachable(problem, asked, reached, alone if alone > most else None, conflicts)
