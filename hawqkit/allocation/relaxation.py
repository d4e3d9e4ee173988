"""Bounds that make the exact solve small: linear relaxation, a good mix, and cells ruled out.

For multipliers u >= 0 of the resources, every mix within the limits has a summed score of at least

    bound(u) = sum over g of min over f of (score[g, f] + u . cost[:, g, f]) - u . slack

(Fisher 1981, the Lagrangian bound). A cell whose own reduced cost lifts that bound above the score
of a mix that is already known cannot stand in a better one, and is dropped: of 1,260 cells some 50
are left. Any u gives a true bound, so nothing rests on the accuracy of the linear program.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array

from hawqkit.allocation.problem import Booleans, Problem
from hawqkit.errors import HawqkitError
from hawqkit.records import Floats, Integers

# A cell is dropped only if its bound is above the known score by more than rounding of the sums.
RELATIVE_MARGIN = 1e-9
ROUNDING = 1e-12
_MOST_ROUNDINGS = 4096
_INFEASIBLE = 2
_MOST_SWAP_CELLS = 600
_MOST_SWAPS = 200


@dataclass(frozen=True, slots=True, eq=False)
class Knapsack:
    """A problem in small integers: group minima are taken off, common divisors divided out.

    Attributes:
        scores: (G, F) in nats; infinite where the cell is dropped.
        costs: (R, G, F) integers, 0 in each group's cheapest cell.
        slack: (R,) what is left above the smallest mix.
        divisors: (R,) what one unit of a cost stands for.
    """

    scores: Floats
    costs: Integers
    slack: Integers
    divisors: Integers

    @property
    def kept(self) -> Booleans:
        """Cells that may still be chosen, (G, F)."""
        return np.isfinite(self.scores)

    def score(self, choice: Integers) -> float:
        """Return the summed score of a choice (G,)."""
        return float(self.scores[np.arange(choice.size), choice].sum())

    def fits(self, choice: Integers) -> bool:
        """Whether a choice (G,) is within all limits."""
        return bool((self.costs[:, np.arange(choice.size), choice].sum(axis=1) <= self.slack).all())


def reduce_problem(problem: Problem, limits: list[int]) -> Knapsack:
    """Return the knapsack under `limits`, without dominated cells.

    A cell is dominated if another of its group has no greater score and no greater cost of any
    resource; of equal cells the first stays.
    """
    allowed = problem.allowed
    groups, formats = allowed.shape
    costs = np.zeros((len(limits), groups, formats), dtype=np.int64)
    slack = np.zeros(len(limits), dtype=np.int64)
    divisors = np.ones(len(limits), dtype=np.int64)
    for row, (resource, limit) in enumerate(zip(problem.resources, limits, strict=True)):
        top = np.iinfo(np.int64).max
        least = np.where(allowed, resource.costs, top).min(axis=1)  # (G,)
        above = np.where(allowed, resource.costs - least[:, None], 0)
        divisors[row] = max(1, int(np.gcd.reduce(above, axis=None)))
        costs[row] = above // divisors[row]
        slack[row] = (limit - resource.fixed - int(least.sum())) // int(divisors[row])
    scores = np.where(allowed, problem.scores, np.inf)
    return _without_dominated(Knapsack(scores, costs, slack, divisors))


def drop_idle_limits(knapsack: Knapsack) -> Knapsack:
    """Drop limits that no mix reaches, and all but the tightest of those with equal costs.

    With one group size in all formats, average bits, bits per weight and bytes are one limit.
    """
    reach = np.where(knapsack.kept, knapsack.costs, 0).max(axis=2).sum(axis=1)  # (R,)
    tightest: dict[bytes, int] = {}
    for row in np.flatnonzero(reach > knapsack.slack).tolist():
        key = np.where(knapsack.kept, knapsack.costs[row], 0).tobytes()
        if key not in tightest or knapsack.slack[row] < knapsack.slack[tightest[key]]:
            tightest[key] = row
    rows = sorted(tightest.values())
    return replace(
        knapsack,
        costs=knapsack.costs[rows],
        slack=knapsack.slack[rows],
        divisors=knapsack.divisors[rows],
    )


def _without_dominated(knapsack: Knapsack) -> Knapsack:
    scores, costs = knapsack.scores, knapsack.costs
    other_s, other_c = scores[:, None, :], costs[:, :, None, :]  # cell a on axis -2, rival b on -1
    own_s, own_c = scores[:, :, None], costs[:, :, :, None]
    not_worse = (other_s <= own_s) & (other_c <= own_c).all(axis=0)  # (G, F, F)
    better = (other_s < own_s) | (other_c < own_c).any(axis=0)
    order = np.arange(scores.shape[1])
    earlier = order[None, :, None] > order[None, None, :]
    dominated = (knapsack.kept[:, None, :] & not_worse & (better | earlier)).any(axis=2)
    return replace(knapsack, scores=np.where(dominated, np.inf, scores))


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """The linear relaxation: shares (G, F), and multipliers (R,) >= 0 in nats a unit of cost."""

    shares: Floats
    multipliers: Floats


def relax(knapsack: Knapsack) -> Relaxation | None:
    """Solve the linear relaxation; None if not even that has a solution."""
    kept = knapsack.kept
    cells = np.argwhere(kept)  # (cells, 2)
    scale = score_scale(knapsack)
    rows = cost_rows(knapsack, cells)
    widths = np.maximum(rows.max(axis=1, initial=1.0), 1.0)  # (R,)
    result = linprog(
        knapsack.scores[kept] * scale,
        A_ub=rows / widths[:, None] if rows.size else None,
        b_ub=knapsack.slack / widths if rows.size else None,
        A_eq=one_each(cells, kept.shape[0]),
        b_eq=np.ones(kept.shape[0]),
        bounds=(0.0, None),
        method="highs",
    )
    if result.status == _INFEASIBLE:
        return None
    if result.status != 0 or result.x is None:
        raise HawqkitError(f"HiGHS could not solve the relaxed allocation: {result.message}")
    shares = np.zeros(kept.shape)
    shares[kept] = result.x
    multipliers = np.zeros(len(knapsack.slack))
    if rows.size:
        multipliers = np.maximum(-np.asarray(result.ineqlin.marginals), 0.0) / widths / scale
    return Relaxation(shares, multipliers)


def score_scale(knapsack: Knapsack) -> float:
    """Return a factor that lifts the sum of greatest scores to 1e6."""
    middle = float(np.where(knapsack.kept, knapsack.scores, 0.0).max(axis=1).sum())
    return 1e6 / middle if middle > 0.0 else 1.0


def cost_rows(knapsack: Knapsack, cells: NDArray[np.intp]) -> Floats:
    """Return the costs of the cells as rows, (R, cells)."""
    return knapsack.costs[:, cells[:, 0], cells[:, 1]].astype(np.float64)


def one_each(cells: NDArray[np.intp], groups: int) -> csr_array:
    """Return the rows that ask for one cell in each group, (G, cells)."""
    count = len(cells)
    return coo_array(
        (np.ones(count), (cells[:, 0], np.arange(count))), shape=(groups, count)
    ).tocsr()


def lagrangian_bound(knapsack: Knapsack, multipliers: Floats) -> tuple[float, Floats]:
    """Return bound(u), and by how much each cell (G, F) would lift it if it were chosen."""
    reduced = knapsack.scores + np.tensordot(multipliers, knapsack.costs, axes=1)  # (G, F)
    least = reduced.min(axis=1)
    bound = float(least.sum() - multipliers @ knapsack.slack)
    return bound, reduced - least[:, None]


def rule_out(knapsack: Knapsack, multipliers: Floats, known: Integers) -> Knapsack:
    """Drop every cell whose bound is above the score of `known` (G,), a mix within the limits."""
    bound, lift = lagrangian_bound(knapsack, multipliers)
    score = knapsack.score(known)
    # The bound is a difference of two sums, each of which may be far above the score.
    margin = RELATIVE_MARGIN * score + ROUNDING * float(multipliers @ knapsack.slack)
    out = bound + lift > score + margin
    out[np.arange(known.size), known] = False
    return replace(knapsack, scores=np.where(out, np.inf, knapsack.scores))


def round_shares(knapsack: Knapsack, relaxation: Relaxation) -> Integers | None:
    """Return the best mix within the limits that differs from the relaxation in split groups alone.

    At most R groups of a vertex are split between formats, so that all their formats can be tried.
    """
    shares = np.where(knapsack.kept, relaxation.shares, -1.0)
    choice = np.asarray(shares.argmax(axis=1), dtype=np.int64)
    split = np.flatnonzero(shares.max(axis=1) < 1.0 - 1e-6)
    options = [np.flatnonzero(knapsack.kept[g]) for g in split]
    best: tuple[float, Integers] | None = None
    for columns in itertools.islice(itertools.product(*options), _MOST_ROUNDINGS):
        trial = choice.copy()
        trial[split] = columns
        if knapsack.fits(trial):
            score = knapsack.score(trial)
            if best is None or score < best[0]:
                best = (score, trial)
    return None if best is None else best[1]


def improve(knapsack: Knapsack, choice: Integers) -> Integers:
    """Change two groups at a time, the best change first, until none lowers the score."""
    cells = np.argwhere(knapsack.kept)
    if len(cells) > _MOST_SWAP_CELLS:
        return choice
    choice = choice.copy()
    group, column = cells[:, 0], cells[:, 1]
    same = group[:, None] == group[None, :]
    for _ in range(_MOST_SWAPS):
        now_score = knapsack.scores[group, choice[group]]
        now_cost = knapsack.costs[:, group, choice[group]]
        gain = knapsack.scores[group, column] - now_score  # (cells,)
        cost = knapsack.costs[:, group, column] - now_cost  # (R, cells)
        used = knapsack.costs[:, np.arange(choice.size), choice].sum(axis=1)
        room = (knapsack.slack - used)[:, None, None]
        within = (cost[:, :, None] + cost[:, None, :] <= room).all(axis=0) & ~same
        both = np.where(within, gain[:, None] + gain[None, :], np.inf)
        first, second = np.unravel_index(int(both.argmin()), both.shape)
        if not both[first, second] < -1e-12 * abs(knapsack.score(choice)):
            return choice
        choice[group[first]] = column[first]
        choice[group[second]] = column[second]
    return choice
