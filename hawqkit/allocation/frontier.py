"""The whole trade between size and predicted loss, in one sweep over the Lagrange multiplier.

For one resource the mixes that some multiplier u >= 0 makes optimal are the vertices of the lower
convex hull: start at the cheapest format of every group, and take steps along each group's own hull
in the order of nats saved per bit (Everett 1963; Sinha and Zoltners 1979). Each mix on the way is
optimal for its own size, and between two of them the bound is the straight line.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hawqkit.allocation.problem import Booleans, Problem, group_costs
from hawqkit.allocation.resources import BITS, Resource, cost_table
from hawqkit.errors import InputError
from hawqkit.records import Floats, Frontier, FrontierPoint, Integers, Trade, TradePoint

AXES = BITS


@dataclass(frozen=True, slots=True, eq=False)
class _Axis:
    """Costs along the swept axis, and everything that the bound needs."""

    scores: Floats  # (G, F), infinite where not allowed
    costs: Integers  # (G, F)
    sizes: Integers  # (K,) size of every vertex, ascending
    slopes: Floats  # (K - 1,) nats saved per bit from a vertex to the next, descending

    def bound(self, size: int) -> float:
        """Return max over u of the Lagrangian bound on every mix that takes at most `size`."""
        if not self.slopes.size:
            return float(self.scores.min(axis=1).sum())
        step = int(np.searchsorted(self.sizes, size, side="left")) - 1
        # Past the last vertex more bits gain nothing: there the multiplier is 0.
        slope = 0.0 if size >= self.sizes[-1] else float(self.slopes[max(step, 0)])
        least = self.costs.min(axis=1, keepdims=True, where=np.isfinite(self.scores),
                               initial=np.iinfo(np.int64).max)  # fmt: skip
        above = self.costs - least  # differences keep the product with u small
        relaxed = (self.scores + slope * above).min(axis=1).sum()
        return float(relaxed - slope * (size - int(least.sum())))


def sweep_frontier(
    problem: Problem, choice: Integers, *, axis: str | None = None, most_points: int = 200
) -> Frontier:
    """Return the frontier of a problem, with a proven bound at each point.

    `bound` says that no mix of at most the point's size along `axis` has a lower summed score. The
    frontier knows the axis alone; the problem's budgets do not cut it.

    Args:
        problem: the table; its groups are kept.
        choice: (G,) the chosen mix, which need not lie on the hull.
        axis: `average_bits` or `bits_per_weight`; None takes the one that is a budget, and
            `average_bits` where both or none is.
        most_points: points are thinned to this many, evenly along the axis; the ends stay.

    Raises:
        InputError: `axis` is neither, or fewer than two points are asked for.
    """
    asked = [r.name for r in problem.resources if r.name in AXES]
    axis = axis or (asked[0] if len(asked) == 1 else AXES[0])
    if axis not in AXES:
        raise InputError(f"unknown axis {axis!r}: known are {', '.join(AXES)}.")
    if most_points < 2:
        raise InputError(f"most_points = {most_points}: a frontier has at least its two ends.")
    tables = [
        group_costs(problem, cost_table(problem.layers, problem.formats, name)) for name in AXES
    ]
    costs = tables[AXES.index(axis)]
    scores = np.where(problem.allowed, problem.scores, np.inf)
    start, steps = _hull_steps(scores, costs, problem.allowed)
    walked, objectives, slopes = _walk(start, steps, scores, tables)
    sizes = walked[AXES.index(axis)]
    swept = _Axis(scores, costs, sizes, slopes)
    entries = sum(layer.numel for layer in problem.layers)

    def point(bits: int, stored: int, objective: float) -> FrontierPoint:
        bound = min(swept.bound(bits if axis == AXES[0] else stored), objective)
        return FrontierPoint(bits / entries, stored / entries, objective, bound)

    def mix_point(mix: Integers) -> FrontierPoint:
        rows = np.arange(mix.size)
        bits, stored = (int(table[rows, mix].sum()) for table in tables)
        return point(bits, stored, problem.objective(mix))

    kept = _thin(sizes, most_points)
    uniform = {
        name: mix_point(np.full(len(problem.groups), column, dtype=np.int64))
        for column, name in enumerate(problem.formats)
        if problem.allowed[:, column].all()
    }
    return Frontier(
        points=tuple(
            point(int(walked[0][k]), int(walked[1][k]), float(objectives[k])) for k in kept
        ),
        uniform=uniform,
        chosen=mix_point(np.asarray(choice, dtype=np.int64)),
    )


def sweep_resource(
    problem: Problem, resource: Resource, choice: Integers, *, most_points: int = 200
) -> Trade:
    """Return the trade between one budget and the score, whatever it counts, with a proven bound.

    At each point no mix that takes at most as much has a summed score below `bound`. The sweep
    knows this budget alone; the problem's budgets do not cut it.

    Args:
        problem: the table; its groups are kept.
        resource: what is traded, with its costs and its scale.
        choice: (G,) the chosen mix, which need not lie on the hull.
        most_points: points are thinned to this many, evenly along the axis; the ends stay.

    Raises:
        InputError: fewer than two points are asked for.
    """
    if most_points < 2:
        raise InputError(f"most_points = {most_points}: a frontier has at least its two ends.")
    costs = resource.costs
    scores = np.where(problem.allowed, problem.scores, np.inf)
    start, steps = _hull_steps(scores, costs, problem.allowed)
    (sizes,), objectives, slopes = _walk(start, steps, scores, [costs])
    swept = _Axis(scores, costs, sizes, slopes)

    def point(size: int, objective: float) -> TradePoint:
        taken = (resource.fixed + size) / resource.scale
        return TradePoint(taken, objective, min(swept.bound(size), objective))

    def mix_point(mix: Integers) -> TradePoint:
        return point(int(costs[np.arange(mix.size), mix].sum()), problem.objective(mix))

    kept = _thin(sizes, most_points)
    uniform = {
        name: mix_point(np.full(len(problem.groups), column, dtype=np.int64))
        for column, name in enumerate(problem.formats)
        if problem.allowed[:, column].all()
    }
    points = tuple(point(int(sizes[k]), float(objectives[k])) for k in kept)
    chosen = mix_point(np.asarray(choice, dtype=np.int64))
    return Trade(resource.name, points, uniform, chosen)


def _hull_steps(
    scores: Floats, costs: Integers, allowed: Booleans
) -> tuple[Integers, list[tuple[float, int, int, int]]]:
    """Return the cheapest choice (G,), and steps (nats per bit, group, from, to) on the hulls."""
    start = np.zeros(len(scores), dtype=np.int64)
    steps = []
    for group in range(len(scores)):
        columns = np.flatnonzero(allowed[group]).tolist()
        columns.sort(key=lambda c: (int(costs[group, c]), float(scores[group, c]), c))
        hull: list[int] = []
        for column in columns:
            if hull and scores[group, column] >= scores[group, hull[-1]]:
                continue
            while len(hull) > 1 and _slope(scores, costs, group, hull[-2], hull[-1]) <= _slope(
                scores, costs, group, hull[-1], column
            ):
                hull.pop()
            hull.append(column)
        start[group] = hull[0]
        for before, after in itertools.pairwise(hull):
            steps.append((_slope(scores, costs, group, before, after), group, before, after))
    steps.sort(key=lambda step: -step[0])  # stable: a group's own steps keep their order
    return start, steps


def _slope(scores: Floats, costs: Integers, group: int, before: int, after: int) -> float:
    saved = float(scores[group, before] - scores[group, after])
    return saved / int(costs[group, after] - costs[group, before])


def _walk(
    start: Integers,
    steps: list[tuple[float, int, int, int]],
    scores: Floats,
    tables: list[Integers],
) -> tuple[list[Integers], Floats, Floats]:
    """Return sizes (K,) in each table, scores (K,), and slopes (K - 1,)."""
    rows = np.arange(start.size)
    group = np.array([s[1] for s in steps], dtype=np.int64)
    before = np.array([s[2] for s in steps], dtype=np.int64)
    after = np.array([s[3] for s in steps], dtype=np.int64)
    walked = [
        np.concatenate([[0], np.cumsum(t[group, after] - t[group, before])])
        + int(t[rows, start].sum())
        for t in tables
    ]
    # Summed from the fine end, where what is left is small: no cancellation in the tail.
    saved = scores[group, before] - scores[group, after]
    end = start.copy()
    end[group] = after  # later steps of a group overwrite earlier ones
    finest = float(scores[rows, end].sum())
    objectives = finest + np.concatenate([np.cumsum(saved[::-1])[::-1], [0.0]])
    return walked, objectives, np.array([s[0] for s in steps], dtype=np.float64)


def _thin(sizes: Integers, most: int) -> list[int]:
    """Return indices of at most `most` points, evenly along the axis, both ends among them."""
    if len(sizes) <= most:
        return list(range(len(sizes)))
    wanted = np.linspace(float(sizes[0]), float(sizes[-1]), most)
    nearest = np.searchsorted(sizes, wanted).clip(0, len(sizes) - 1)
    return sorted({0, len(sizes) - 1, *map(int, nearest[1:-1])})
