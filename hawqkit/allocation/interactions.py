"""Allocation where layers interact: what two layers' errors do together counts too.

    minimize    sum_g s[g, f_g]  +  sum over g != h of C[g, f_g, h, f_h]
    subject to  every budget, and  sum_g s[g, f_g] <= 1.1 times its least

with C products of errors. From the proven optimum of the sum alone, one or two groups are changed
at a time until no such change helps. What is proven stays: the sum is within a tenth of its least.

Letters in shapes: G groups, F formats, R budgets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hawqkit.allocation.exact import Solution
from hawqkit.allocation.problem import Problem
from hawqkit.errors import InputError
from hawqkit.records import Floats, Integers

# A mix whose layers lose much more by themselves and are to cancel each other is not to be trusted:
# products of large errors are where second order is furthest from the truth.
MOST_SUM = 1.1  # times the least summed score
LEAST_GAIN = 1e-12  # relative: smaller gains are rounding


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """What groups do to each other.

    Attributes:
        products: (G, F, G, F) C, symmetric; blocks of one group are not read.
        own: (G, F) added to a group's score: what its members do to each other.
    """

    products: Floats
    own: Floats


def refine(problem: Problem, start: Solution, interactions: Interactions) -> Solution:
    """Return a mix within every budget that no change of one or two groups improves.

    Args:
        problem: the table and the budgets.
        start: its optimum without interactions.
        interactions: see there.

    Returns:
        the mix; `objective` is with interactions, the certificate is of the sum alone.

    Raises:
        InputError: shapes do not belong together.
    """
    g, f = problem.scores.shape
    if interactions.products.shape != (g, f, g, f) or interactions.own.shape != (g, f):
        raise InputError(
            f"interactions have the shapes {interactions.products.shape} and "
            f"{interactions.own.shape}; {g} groups and {f} formats need {(g, f, g, f)} and "
            f"{(g, f)}."
        )
    search = _Search(problem, interactions, MOST_SUM * problem.objective(start.choice))
    choice = search.descend(start.choice.copy())
    alone = problem.objective(choice)
    proof = start.certificate
    certificate = replace(
        proof,
        solver=f"{proof.solver}, then changes of one or two groups",
        status=f"{proof.status}, then within a factor of {MOST_SUM:g} of it",
        objective=alone,
        relative_gap=(alone - proof.bound) / max(abs(alone), 1e-300),
    )
    return Solution(choice, search.objective(choice), certificate)


class _Search:
    """Objective and improving changes, with all cells numbered g F + f."""

    def __init__(self, problem: Problem, interactions: Interactions, most: float) -> None:
        self.problem, self.most = problem, most
        groups, formats = problem.scores.shape
        self.formats = formats
        self.allowed = problem.allowed.ravel()
        self.scores = np.where(self.allowed, (problem.scores + interactions.own).ravel(), 0.0)
        size = groups * formats
        self.group = np.repeat(np.arange(groups), formats)
        same = self.group[:, None] == self.group[None, :]
        self.cross = np.where(same, 0.0, interactions.products.reshape(size, size))
        self.alone = np.where(self.allowed, problem.scores.ravel(), 0.0)
        self.costs = np.stack([r.costs.ravel() for r in problem.resources]).astype(np.float64)

    def cells(self, choice: Integers) -> Integers:
        """Return the numbers of the chosen cells (G,)."""
        numbers: Integers = np.arange(choice.size) * self.formats + choice
        return numbers

    def objective(self, choice: Integers) -> float:
        """Return summed scores and interactions of a choice (G,)."""
        at = self.cells(choice)
        return float(self.scores[at].sum() + self.cross[np.ix_(at, at)].sum())

    def descend(self, choice: Integers) -> Integers:
        """Take the best change of one or two groups again and again."""
        least = LEAST_GAIN * max(abs(self.objective(choice)), 1e-300)
        while True:
            for change in self._changes(choice, least):
                changed = choice.copy()
                changed[self.group[list(change)]] = [c % self.formats for c in change]
                if self.problem.fits(changed):  # `size` is counted as the true bytes of a mix
                    choice = changed
                    break
            else:
                return choice

    def _changes(self, choice: Integers, least: float) -> list[tuple[int, ...]]:
        """Return the best changes as lists of new cells, best first; none if nothing helps."""
        at = self.cells(choice)
        now = at[self.group]  # (G F,) the chosen cell of every cell's group
        load = self.cross[:, at].sum(1)  # what a cell meets in the present mix
        one = self.scores - self.scores[now] + 2 * (load - load[now])
        one = np.where(self.allowed, one, np.inf)
        left = [r.limit - r.used(choice) for r in self.problem.resources]
        room = np.array([*left, self.most - self.alone[at].sum()])  # (R + 1,)
        costs = np.vstack([self.costs, self.alone])
        more = costs - costs[:, now]  # (R + 1, G F)
        fits = (more <= room[:, None]).all(0)
        singles = np.where(fits, one, np.inf)
        met = self.cross - self.cross[:, now]
        both = met - met[now]  # what two changes do to each other
        pairs = one[:, None] + one[None, :] + 2 * both
        apart = self.group[:, None] != self.group[None, :]
        possible = apart & self.allowed[:, None] & self.allowed[None, :]
        for r in range(len(room)):
            possible &= more[r][:, None] + more[r][None, :] <= room[r]
        pairs = np.where(possible, pairs, np.inf)
        found: list[tuple[float, tuple[int, ...]]] = []
        first = int(singles.argmin())
        found.append((float(singles[first]), (first,)))
        for flat in np.argpartition(pairs, min(8, pairs.size - 1), axis=None)[:8]:
            a, b = divmod(int(flat), pairs.shape[1])
            found.append((float(pairs[a, b]), (a, b)))
        return [cells for gain, cells in sorted(found) if gain < -least]
