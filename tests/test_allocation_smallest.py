"""The smallest mix within a limit on the loss, against a search of every mix there is."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from random_problems import SIX, falling_scores, llama_layers, plain_size_table, random_layers

from hawqkit.allocation import (
    Problem,
    Resource,
    Solution,
    build_problem,
    solve,
    solve_smallest,
    stored_resource,
)
from hawqkit.errors import BudgetError

MENU = ("int2-g32", "int3-channel", "int4-g64", "int4-channel-asym", "int8-g32")
ASKED = "max_predicted_kl = 0.05"


def random_problem(rng: np.random.Generator, *, budget: bool) -> Problem:
    """Up to 6 layers and 5 formats, with holes, ties and perhaps another budget."""
    layers = random_layers(rng, int(rng.integers(1, 7)))
    formats = sorted({"int3-channel", *rng.choice(MENU, int(rng.integers(1, 5)))})
    unit = float(10.0 ** rng.integers(-9, 3))
    scores = falling_scores(layers, formats, rng, unit)
    scores *= np.exp(rng.normal(0.0, 0.7, scores.shape))
    if rng.random() < 0.4:
        scores = np.ceil(scores / unit * 10) / 10 * unit  # ties
    return build_problem(
        layers,
        formats,
        scores,
        runtime=str(rng.choice(["transformers", "vllm"])),
        budgets={"average_bits": float(rng.uniform(3.0, 8.0))} if budget else {},
    )


def score(solution: Solution) -> float:
    return solution.objective


def every_mix(problem: Problem, resource: Resource) -> list[tuple[int, float]]:
    """Return (amount, summed score) of every mix within the problem's budgets."""
    columns = [np.flatnonzero(row).tolist() for row in problem.allowed]
    found = []
    for mix in itertools.product(*columns):
        choice = np.array(mix, dtype=np.int64)
        if problem.fits(choice):
            loss = math.fsum(float(problem.scores[g, f]) for g, f in enumerate(mix))
            amount = resource.fixed + sum(int(resource.costs[g, f]) for g, f in enumerate(mix))
            found.append((amount, loss))
    return found


@pytest.mark.parametrize("bytes_of_files", [False, True])
@pytest.mark.parametrize("block", range(4))
def test_no_mix_of_fewer_bytes_has_so_small_a_score(block: int, bytes_of_files: bool) -> None:
    solved = 0
    for seed in range(40 * block, 40 * block + 40):
        rng = np.random.default_rng(seed)
        problem = random_problem(rng, budget=seed % 2 == 0)
        table = plain_size_table(problem.layers, problem.formats) if bytes_of_files else None
        resource = stored_resource(problem, table)
        mixes = every_mix(problem, resource)
        if not mixes:
            continue
        # Sometimes exactly the score of a mix: then that mix is within the limit.
        losses = sorted(loss for _, loss in mixes)
        most = losses[int(rng.integers(0, len(losses)))] * float(rng.choice([1.0, 1.01]))
        if most == 0.0:
            continue
        found = solve_smallest(problem, resource, score, most, asked=ASKED)
        least = min(amount for amount, loss in mixes if loss <= most)
        assert found.amount == found.bound == least == resource.used(found.solution.choice)
        assert found.loss == found.solution.objective <= most
        # Of the mixes of that size, none has a smaller score.
        best = min(loss for amount, loss in mixes if amount <= least)
        assert found.solution.objective == pytest.approx(best, rel=1e-12)
        assert found.solution.certificate.relative_gap <= 1e-9
        assert problem.fits(found.solution.choice)
        smaller = [(amount, loss) for amount, loss in mixes if amount < least]
        if smaller:
            assert found.below is not None
            assert found.below[0] < least
            assert found.below[2] > most
        else:
            assert found.below is None
        solved += 1
    assert solved >= 25


def test_a_smaller_limit_never_gives_a_smaller_mix() -> None:
    layers = llama_layers(6)
    problem = build_problem(
        layers, SIX, falling_scores(layers, SIX, np.random.default_rng(3)), budgets={}
    )
    resource = stored_resource(problem)
    top = solve(replace(problem, scores=-problem.scores + problem.scores.max())).choice
    most = problem.objective(top)
    amounts = [
        solve_smallest(problem, resource, score, most * share, asked=ASKED).amount
        for share in (1.0, 0.5, 0.2, 0.05, 0.01, 0.002)
    ]
    assert amounts[0] == resource.used(np.zeros(len(problem.groups), dtype=np.int64))
    assert amounts == sorted(amounts)
    assert len(set(amounts)) == len(amounts)


def test_210_layers_take_few_solves_and_the_size_is_proven() -> None:
    layers = llama_layers(30)
    scores = falling_scores(layers, SIX, np.random.default_rng(5))
    problem = build_problem(layers, SIX, scores, budgets={})
    middle = solve(build_problem(layers, SIX, scores, budgets={"average_bits": 4})).objective
    found = solve_smallest(problem, stored_resource(problem), score, middle, asked=ASKED)
    assert found.loss <= middle
    assert found.below is not None
    assert found.below[2] > middle
    # Sizes have some 5,760 places, a k_proj's 110,592 entries apart: 13 solves by halving alone.
    assert found.solves <= 13
    assert found.amount <= 4.25 * sum(layer.numel for layer in layers)


def test_a_grid_of_single_bytes_ends_at_a_narrow_bracket_that_is_proven() -> None:
    layers = llama_layers(8)
    scores = falling_scores(layers, SIX, np.random.default_rng(2))
    problem = build_problem(layers, SIX, scores, budgets={})
    table = plain_size_table(layers, SIX)
    ragged = np.arange(table.costs.size).reshape(table.costs.shape) * 37 % 101  # like file names
    resource = stored_resource(problem, replace(table, costs=table.costs + ragged))
    middle = solve(build_problem(layers, SIX, scores, budgets={"average_bits": 4.1})).objective
    found = solve_smallest(problem, resource, score, middle, asked=ASKED)
    assert found.loss <= middle
    assert found.bound <= found.amount <= found.bound * (1 + 1.1e-5)
    tight = replace(resource, limit=found.bound - 1)
    assert solve(replace(problem, resources=(tight,))).certificate.bound > middle
    assert found.solves <= 20


def test_the_found_size_is_one_more_budget() -> None:
    layers = llama_layers(3)
    problem = build_problem(
        layers, SIX, falling_scores(layers, SIX, np.random.default_rng(1)), budgets={}
    )
    found = solve_smallest(problem, stored_resource(problem), score, 3.0, asked=ASKED)
    assert found.problem.fits(found.solution.choice)
    assert found.problem.resources[-1].limit == found.amount
    assert solve(found.problem).choice.tolist() == found.solution.choice.tolist()


def test_a_loss_that_is_not_the_score_is_what_holds() -> None:
    layers = llama_layers(3)
    rng = np.random.default_rng(8)
    problem = build_problem(layers, SIX, falling_scores(layers, SIX, rng), budgets={})
    other = problem.scores * np.exp(rng.normal(0.3, 0.2, problem.scores.shape))

    def loss(solution: Solution) -> float:
        return float(other[np.arange(solution.choice.size), solution.choice].sum())

    found = solve_smallest(problem, stored_resource(problem), loss, 3.0, asked=ASKED)
    assert found.loss == loss(found.solution) <= 3.0
    assert found.below is not None
    assert found.below[2] > 3.0
    assert found.below[1] > found.solution.objective


def test_a_limit_below_every_mix_is_refused_with_the_least_there_is() -> None:
    layers = llama_layers(2)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={})
    resource = stored_resource(problem)
    reached = solve(problem).objective
    with pytest.raises(BudgetError) as caught:
        solve_smallest(problem, resource, score, reached / 2, asked=ASKED)
    message = str(caught.value)
    assert f"budget {ASKED} cannot be met" in message
    least = float(message.split("reach is ")[1].split(". Raise")[0])
    assert reached <= least < reached * 1.001
    # What the message names can be asked for.
    assert solve_smallest(problem, resource, score, least, asked=ASKED).loss <= least


def test_a_contradiction_names_the_budget_and_both_ways_out() -> None:
    layers = llama_layers(2)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    free = build_problem(layers, SIX, scores, budgets={})
    budgets = {"average_bits": 4.0, "bits_per_weight": 7.0}
    problem = build_problem(layers, SIX, scores, budgets=budgets)
    most = solve(problem).objective / 3
    resource = stored_resource(problem)
    with pytest.raises(BudgetError) as caught:
        solve_smallest(problem, resource, score, most, asked=ASKED)
    message = str(caught.value)
    assert f"budgets {ASKED} and average_bits = 4 contradict each other" in message
    assert "bits_per_weight" not in message  # 7 bits are no obstacle
    least = float(message.split("least predicted KL is ")[1].split(",")[0])
    assert solve_smallest(problem, resource, score, least, asked=ASKED).loss <= least
    bits = float(message.split("takes at least average_bits ")[1].split(". Raise")[0])
    wider = build_problem(layers, SIX, scores, budgets={"average_bits": bits})
    assert solve_smallest(wider, resource, score, most, asked=ASKED).loss <= most
    assert solve_smallest(free, resource, score, most, asked=ASKED).loss <= most


def test_an_impossible_other_budget_is_named_as_ever() -> None:
    layers = llama_layers(2)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 1.5})
    with pytest.raises(BudgetError, match=r"average_bits = 1\.5 cannot be met"):
        solve_smallest(problem, stored_resource(problem), score, 9.0, asked=ASKED)


def test_mixes_without_loss_hold_every_limit() -> None:
    layers = llama_layers(1)
    formats = ("int4-g64", "none")
    scores = np.zeros((len(layers), 2))
    scores[:, 0] = 1.0
    problem = build_problem(layers, formats, scores, budgets={})
    found = solve_smallest(problem, stored_resource(problem), score, 0.5, asked=ASKED)
    assert found.loss == 0.0
    assert set(problem.mix(found.solution.choice).values()) == {"none"}
    half = solve_smallest(problem, stored_resource(problem), score, 3.0, asked=ASKED)
    assert half.loss == 3.0
