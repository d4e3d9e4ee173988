"""Allocations with interactions, against every mix there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hawqkit.allocation import build_problem, solve
from hawqkit.allocation.interactions import MOST_SUM, Interactions, refine
from hawqkit.errors import InputError
from hawqkit.records import Layer

FORMATS = ["int2-channel", "int4-channel", "int8-channel"]


def case(seed, layers=5, share=0.8):
    """Return a problem with interactions from correlated errors of layers, as a probe has them."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(16, 80, layers)
    known = tuple(Layer(f"l{i}", "linear", int(n), 32, "float32") for i, n in enumerate(sizes))
    common = rng.standard_normal((60, 1, 1))
    own = rng.standard_normal((60, layers, 3))
    p = (common + own) * rng.uniform(0.5, 2, layers)[:, None] * np.array([1.0, 0.3, 0.02])
    gram = np.einsum("sgf,shk->gfhk", p, p) / len(p)
    scores = np.einsum("gfgf->gf", gram).copy()
    problem = build_problem(known, FORMATS, scores, budgets={"average_bits": 3.7})
    return problem, Interactions(share * gram, np.zeros_like(scores))


def objective(problem, interactions, choice):
    total = sum(problem.scores[g, f] for g, f in enumerate(choice))
    for g, f in enumerate(choice):
        for h, k in enumerate(choice):
            if g != h:
                total += interactions.products[g, f, h, k]
    return total


def best_of_all(problem, interactions, most):
    """Return the least objective of all mixes within the budgets whose sum is at most `most`."""
    choices = (np.array(c) for c in itertools.product(range(3), repeat=5))
    return min(
        objective(problem, interactions, c)
        for c in choices
        if problem.fits(c) and problem.objective(c) <= most * (1 + 1e-12)
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_mix_is_close_to_the_best_of_all_within_a_tenth_of_the_least_sum(seed):
    problem, interactions = case(seed)
    start = solve(problem)
    found = refine(problem, start, interactions)
    assert problem.fits(found.choice)
    np.testing.assert_allclose(
        found.objective, objective(problem, interactions, found.choice), rtol=1e-12
    )
    assert found.objective <= objective(problem, interactions, start.choice) * (1 + 1e-12)
    most = MOST_SUM * start.objective
    assert found.objective <= best_of_all(problem, interactions, most) * 1.05
    alone = problem.objective(found.choice)
    assert alone <= most * (1 + 1e-12)
    proof = found.certificate
    assert (proof.objective, proof.bound) == (alone, start.certificate.bound)
    np.testing.assert_allclose(proof.relative_gap, 1 - proof.bound / alone, atol=1e-12)


def test_most_mixes_are_the_best_of_all():
    hits = changed = 0
    for seed in range(20):
        problem, interactions = case(seed)
        start = solve(problem)
        found = refine(problem, start, interactions)
        best = best_of_all(problem, interactions, MOST_SUM * start.objective)
        hits += found.objective <= best * (1 + 1e-12)
        changed += not np.array_equal(found.choice, start.choice)
    assert hits >= 18
    assert changed >= 1


def test_without_interactions_the_optimum_stays():
    problem, _ = case(3)
    start = solve(problem)
    none = Interactions(np.zeros((5, 3, 5, 3)), np.zeros((5, 3)))
    found = refine(problem, start, none)
    np.testing.assert_array_equal(found.choice, start.choice)
    np.testing.assert_allclose(found.objective, start.objective, rtol=1e-12)


def test_shapes_that_do_not_belong_together_are_refused():
    problem, interactions = case(0)
    wrong = Interactions(interactions.products[:4], interactions.own)
    with pytest.raises(InputError, match="5 groups and 3 formats"):
        refine(problem, solve(problem), wrong)
