from __future__ import annotations

import time

import numpy as np
import pytest
from random_problems import SIX, falling_scores, llama_layers

from hawqkit.allocation import build_problem, keep_shares, solve
from hawqkit.errors import InputError, NumericalError
from hawqkit.records import Floats, Layer


def test_the_same_scores_keep_every_format() -> None:
    layers = llama_layers(3)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4}, runtime="vllm")
    shares = keep_shares(
        problem,
        solve(problem).choice,
        lambda generator: scores,
        draws=3,
        generator=np.random.default_rng(1),
    )
    assert shares == {layer.name: 1.0 for layer in layers}


def test_shares_equal_the_chance_that_the_order_of_two_layers_flips() -> None:
    # One of two equal layers gets 8 bits, the other 2: the one whose loss at 2 bits is greater.
    layers = tuple(Layer(n, "linear", 8, 64, "float32") for n in "ab")
    formats = ("int2-g64", "int8-g64")
    scores = np.array([[1.2, 0.0], [1.0, 0.0]])
    problem = build_problem(layers, formats, scores, budgets={"average_bits": 5})
    choice = solve(problem).choice
    assert choice.tolist() == [1, 0]

    def flip(generator: np.random.Generator) -> Floats:
        return scores[::-1].copy() if generator.random() < 0.25 else scores

    draws = 120
    shares = keep_shares(problem, choice, flip, draws=draws, generator=np.random.default_rng(7))
    stderr = (0.25 * 0.75 / draws) ** 0.5
    assert abs(shares["a"] - 0.75) < 4 * stderr
    assert shares["a"] == shares["b"]


def test_members_of_a_group_share_their_probability_and_seeds_repeat() -> None:
    layers = llama_layers(4)
    scores = falling_scores(layers, SIX, np.random.default_rng(2))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4}, runtime="vllm")
    choice = solve(problem).choice

    def noisy(generator: np.random.Generator) -> Floats:
        return scores * np.exp(generator.normal(0.0, 0.5, scores.shape))

    runs = [
        keep_shares(problem, choice, noisy, draws=8, generator=np.random.default_rng(3))
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert list(runs[0]) == [layer.name for layer in layers]
    assert min(runs[0].values()) < 1.0
    for block in range(4):
        q, k, v = (runs[0][f"model.layers.{block}.self_attn.{n}_proj"] for n in "qkv")
        assert q == k == v


def test_bad_draws_and_bad_tables_are_refused() -> None:
    layers = llama_layers(1)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4})
    choice = solve(problem).choice
    generator = np.random.default_rng(0)
    with pytest.raises(InputError, match="draws = 0"):
        keep_shares(problem, choice, lambda g: scores, draws=0, generator=generator)
    with pytest.raises(NumericalError, match="not negative"):
        keep_shares(problem, choice, lambda g: -scores, generator=generator)


def test_32_draws_of_210_layers_are_fast() -> None:
    layers = llama_layers(30)
    scores = falling_scores(layers, SIX, np.random.default_rng(1))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4})
    start = time.perf_counter()
    keep_shares(
        problem,
        solve(problem).choice,
        lambda g: scores * np.exp(g.normal(0.0, 0.1, scores.shape)),
        generator=np.random.default_rng(0),
    )
    assert time.perf_counter() - start < 15.0  # 1.3 s on an idle core
