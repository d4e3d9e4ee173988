"""Allocation where layers interact: what two layers' errors do together counts too.

    minimize    sum_g s[g, f_g]  +  sum over g != h of C[g, f_g, h, f_h]
    subject to  every budget

with C a positive semi-definite matrix of products, so a quadratic knapsack. The optimum of the sum
alone is improved by changing one or two groups at a time, until no such change helps. How good that
is says a bound: for one format a group x[g, f] is 0 or 1 and x^2 = x, so the objective equals the
convex `x' C x + sum (s - diag C) x`, whose minimum over fractional x, by Frank and Wolfe's method
(1956; Jaggi 2013), no mix can go below.

Letters in shapes: G groups, F formats, R resources.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, vstack

from hawqkit.allocation.exact import Solution
from hawqkit.allocation.problem import Problem
from hawqkit.errors import InputError
from hawqkit.records import Certificate, Floats, Integers

SOLVER = "changes of one or two groups, from the optimum without interactions"
STATUS = "no such change is better; the bound is Frank and Wolfe's"
LEAST_GAIN = 1e-12  # relative: smaller gains are rounding
FRANK_WOLFE_STEPS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """What groups do to each other.

    Attributes:
        products: (G, F, G, F) C, symmetric and positive semi-definite as a matrix; blocks of one
            group are read for the bound alone.
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
        the mix; `objective` and certificate are with interactions.

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
    search = _Search(problem, interactions)
    choice = search.descend(start.choice.copy())
    objective = search.objective(choice)
    bound = min(_lower_bound(problem, search, choice), objective)
    gap = (objective - bound) / max(abs(objective), 1e-300)
    certificate = Certificate(
        solver=SOLVER,
        status=STATUS,
        objective=objective,
        bound=bound,
        relative_gap=gap,
        groups=g,
        variables=int(problem.allowed.sum()),
    )
    return Solution(choice, objective, certificate)


class _Search:
    """Objective and improving changes, with all cells numbered g F + f."""

    def __init__(self, problem: Problem, interactions: Interactions) -> None:
        self.problem = problem
        groups, formats = problem.scores.shape
        self.formats = formats
        self.allowed = problem.allowed.ravel()
        self.scores = np.where(self.allowed, (problem.scores + interactions.own).ravel(), 0.0)
        size = groups * formats
        self.full: Floats = interactions.products.reshape(size, size)
        self.group = np.repeat(np.arange(groups), formats)
        self.cross = np.where(self.group[:, None] == self.group[None, :], 0.0, self.full)
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
        room = np.array([r.limit - r.used(choice) for r in self.problem.resources])  # (R,)
        more = self.costs - self.costs[:, now]  # (R, G F)
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


def _lower_bound(problem: Problem, search: _Search, choice: Integers) -> float:
    """Return what no mix within the budgets goes below."""
    quadratic = np.where(search.allowed[:, None] & search.allowed[None, :], search.full, 0.0)
    linear = search.scores - quadratic.diagonal()
    x: NDArray[np.float64] = np.zeros(search.scores.size)
    x[search.cells(choice)] = 1.0
    one_each = csr_array(
        (np.ones(x.size), (search.group, np.arange(x.size))), shape=(choice.size, x.size)
    )
    limits = np.array([r.limit - r.fixed for r in problem.resources], dtype=np.float64)
    scale = np.maximum(limits, 1.0)
    above = vstack([csr_array(row[None] / s) for row, s in zip(search.costs, scale, strict=True)])
    best = -np.inf
    for _ in range(FRANK_WOLFE_STEPS):
        slope = 2 * quadratic @ x + linear
        largest = max(float(np.abs(slope).max()), 1e-300)
        found = linprog(
            slope / largest,
            A_ub=above,
            b_ub=limits / scale,
            A_eq=one_each,
            b_eq=np.ones(choice.size),
            bounds=[(0.0, 1.0 if a else 0.0) for a in search.allowed],
            method="highs",
        )
        if found.x is None:
            break
        step = found.x - x
        value = float(x @ quadratic @ x + linear @ x)
        best = max(best, value + float(slope @ step))
        bend = float(step @ quadratic @ step)
        share = 1.0 if bend <= 0 else min(1.0, max(0.0, -float(slope @ step) / (2 * bend)))
        if share == 0.0:
            break
        x = x + share * step
    return best
