from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from random_problems import SIX, falling_scores, llama_layers, random_layers

from hawqkit.allocation import Problem, build_problem, solve, sweep_frontier
from hawqkit.allocation.problem import cost_table, group_costs
from hawqkit.errors import InputError
from hawqkit.records import Floats, Integers


def least_scores(problem: Problem, costs: Integers) -> list[tuple[int, float]]:
    """Every mix as (size, score), by plain enumeration."""
    columns = [np.flatnonzero(row).tolist() for row in problem.allowed]
    return [
        (
            sum(int(costs[g, f]) for g, f in enumerate(mix)),
            math.fsum(float(problem.scores[g, f]) for g, f in enumerate(mix)),
        )
        for mix in itertools.product(*columns)
    ]


def small_problem(seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    layers = random_layers(rng, int(rng.integers(1, 6)))
    formats = ("int2-g32", "int3-channel", "int4-g64", "int8-channel")
    scores = falling_scores(layers, formats, rng)
    scores *= np.exp(rng.normal(0.0, 0.8, scores.shape))
    if seed % 3 == 0:
        scores = np.round(scores, 1)
    return build_problem(layers, formats, scores, budgets={"average_bits": 8})


@pytest.mark.parametrize("axis", ["average_bits", "bits_per_weight"])
def test_bound_optimum_and_objective_are_in_order_at_every_point(axis: str) -> None:
    checked = 0
    for seed in range(40):
        problem = small_problem(seed)
        costs = group_costs(problem, cost_table(problem.layers, problem.formats, axis))
        mixes = least_scores(problem, costs)
        entries = sum(layer.numel for layer in problem.layers)
        frontier = sweep_frontier(problem, solve(problem).choice, axis=axis)
        points = [*frontier.points, *frontier.uniform.values(), frontier.chosen]
        for point in points:
            size = round(getattr(point, axis) * entries)
            optimum = min(score for bits, score in mixes if bits <= size)
            slack = 1e-12 * max(score for _, score in mixes)  # rounding of the sums
            assert point.bound <= optimum + slack
            assert optimum <= point.objective + slack
            checked += 1
        for point in frontier.points:  # hull points are optimal themselves
            assert point.bound == pytest.approx(point.objective, rel=1e-9, abs=slack)
    assert checked > 200


def test_points_ascend_in_size_and_fall_in_score() -> None:
    layers = llama_layers(6)
    scores = falling_scores(layers, SIX, np.random.default_rng(1))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4})
    frontier = sweep_frontier(problem, solve(problem).choice)
    sizes = [p.average_bits for p in frontier.points]
    objectives = [p.objective for p in frontier.points]
    bounds = [p.bound for p in frontier.points]
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert all(a > b for a, b in itertools.pairwise(objectives))
    assert all(a >= b for a, b in itertools.pairwise(bounds))
    assert (sizes[0], sizes[-1]) == (2.0, 8.0)
    assert objectives[0] == pytest.approx(scores[:, 0].sum(), rel=1e-12)
    assert objectives[-1] == pytest.approx(scores.min(axis=1).sum(), rel=1e-12)


def test_the_chosen_point_lies_between_its_bound_and_the_hull() -> None:
    layers = llama_layers(8)
    scores = falling_scores(layers, SIX, np.random.default_rng(2))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 3.6})
    solution = solve(problem)
    frontier = sweep_frontier(problem, solution.choice)
    chosen = frontier.chosen
    assert chosen.objective == solution.objective
    assert chosen.bound <= chosen.objective
    assert chosen.objective <= chosen.bound * 1.05  # 56 layers: a step of the hull is small
    below = [p for p in frontier.points if p.average_bits <= chosen.average_bits]
    assert chosen.objective <= below[-1].objective * (1 + 1e-12)


def test_uniform_points_are_the_formats_that_every_layer_takes() -> None:
    layers = llama_layers(2)
    scores = falling_scores(layers, SIX, np.random.default_rng(3))
    available = np.ones(scores.shape, dtype=np.bool_)
    available[4, 1] = False
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4}, available=available)
    uniform = sweep_frontier(problem, solve(problem).choice).uniform
    assert list(uniform) == [name for name in SIX if name != "int3-g64"]
    assert uniform["int4-g64"].average_bits == 4.0
    assert uniform["int4-g64"].bits_per_weight == 4.25
    assert uniform["int4-g64"].objective == pytest.approx(scores[:, 2].sum(), rel=1e-12)
    assert all(p.bound < p.objective for p in list(uniform.values())[1:-1])


def test_thinning_keeps_the_ends_and_at_most_the_points_asked_for() -> None:
    layers = llama_layers(30)
    scores = falling_scores(layers, SIX, np.random.default_rng(4))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4})
    choice = solve(problem).choice
    full = sweep_frontier(problem, choice, most_points=10**6).points
    thin = sweep_frontier(problem, choice).points
    assert 150 <= len(thin) <= 200 < len(full)
    assert (thin[0], thin[-1]) == (full[0], full[-1])
    assert set(thin) <= set(full)
    gaps = np.diff([p.average_bits for p in thin])
    assert gaps.max() < 0.15


def test_the_tail_keeps_its_precision() -> None:
    layers = llama_layers(3)
    scores = falling_scores(layers, (*SIX, "none"), np.random.default_rng(5))
    scores[:, 5] = 1e-18
    problem = build_problem(layers, (*SIX, "none"), scores, budgets={"average_bits": 16})
    points = sweep_frontier(problem, solve(problem).choice, most_points=10**6).points
    assert points[-1].objective == 0.0
    assert points[-2].objective == pytest.approx(1e-18, rel=1e-9)


def test_the_axis_follows_the_budget_and_wrong_ones_are_refused() -> None:
    layers = llama_layers(1)
    formats = ("int4-g32", "int4-g128", "int8-g64")
    scores: Floats = np.tile([1.0, 2.0, 0.1], (7, 1))
    layers = tuple(x for x in layers if x.columns % 128 == 0)
    scores = scores[: len(layers)]
    bits = build_problem(layers, formats, scores, budgets={"average_bits": 8})
    stored = build_problem(layers, formats, scores, budgets={"bits_per_weight": 9})
    choice = solve(bits).choice
    # Of one width the lower score counts for average bits; g128 is smaller only in stored bits.
    assert sweep_frontier(bits, choice).points[0].bits_per_weight == 4.5
    assert sweep_frontier(stored, choice).points[0].bits_per_weight == 4.125
    with pytest.raises(InputError, match="unknown axis 'size'"):
        sweep_frontier(bits, choice, axis="size")
    with pytest.raises(InputError, match="most_points = 1"):
        sweep_frontier(bits, choice, most_points=1)


def test_a_single_format_has_one_point() -> None:
    layers = llama_layers(1)
    problem = build_problem(layers, ["int4-g64"], np.ones((7, 1)), budgets={"average_bits": 4})
    frontier = sweep_frontier(problem, np.zeros(7, dtype=np.int64))
    assert frontier.points == (frontier.chosen,)
    assert (frontier.chosen.objective, frontier.chosen.bound) == (7.0, 7.0)


def test_the_whole_frontier_of_210_layers_is_fast() -> None:
    layers = llama_layers(30)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4})
    choice = solve(problem).choice
    start = time.perf_counter()
    sweep_frontier(problem, choice)
    assert time.perf_counter() - start < 2.0  # 0.02 s on an idle core
