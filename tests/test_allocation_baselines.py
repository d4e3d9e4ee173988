from __future__ import annotations

import itertools

import numpy as np
import pytest
from random_problems import SIX, falling_scores, llama_layers, plain_size_table

from hawqkit.allocation import Problem, build_problem, make_baselines, solve, with_scores
from hawqkit.allocation.grouping import merge_layers
from hawqkit.errors import InputError, NumericalError
from hawqkit.formats import parse_format
from hawqkit.records import Floats, Layer, Mix


def embedded_layers(blocks: int) -> tuple[Layer, ...]:
    """Blocks between an embedding and a head of their own."""
    embedding = Layer("model.embed_tokens", "embedding", 2048, 576, "bfloat16")
    return (embedding, *llama_layers(blocks), Layer("lm_head", "linear", 2048, 576, "bfloat16"))


LAYERS = embedded_layers(6)
RNG = np.random.default_rng(11)
SCORES = falling_scores(LAYERS, SIX, RNG)
ERRORS = falling_scores(LAYERS, SIX, RNG)
TRACES = falling_scores(LAYERS, SIX, RNG)
SIZE = plain_size_table(LAYERS, SIX)


def baselines(problem: Problem) -> tuple[dict[str, Mix], tuple[str, ...]]:
    mixes, warnings = make_baselines(
        problem, weight_error=ERRORS, trace_scores=TRACES, size_tables=[SIZE]
    )
    return {mix.name: mix for mix in mixes}, warnings


def score_of(layers: dict[str, str], table: Floats) -> float:
    return sum(float(table[i, SIX.index(layers[x.name])]) for i, x in enumerate(LAYERS))


@pytest.mark.parametrize("runtime", ["transformers", "vllm"])
@pytest.mark.parametrize("budget", [3.5, 4.0, 4.5, 6.0])
def test_every_baseline_fits_the_budget_and_loses_to_the_choice(
    runtime: str, budget: float
) -> None:
    budgets = {"average_bits": budget, "bits_per_weight": budget + 0.3}
    problem = build_problem(LAYERS, SIX, SCORES, budgets=budgets, runtime=runtime)
    best = solve(problem).objective
    mixes, warnings = baselines(problem)
    assert list(mixes) == ["uniform", "ends", "weight-error", "hawq-v2"] or warnings
    groups, _ = merge_layers([layer.name for layer in LAYERS], runtime)
    for mix in mixes.values():
        assert list(mix.layers) == [layer.name for layer in LAYERS]
        bits = sum(x.numel * (parse_format(mix.layers[x.name]).bits or 0) for x in LAYERS)
        assert bits <= budget * sum(x.numel for x in LAYERS)
        assert mix.totals.average_bits <= budget
        assert mix.totals.bits_per_weight <= budget + 0.3
        assert mix.totals.size == {"plain": SIZE.exact(mix.layers)}
        assert mix.objective == pytest.approx(score_of(mix.layers, SCORES), rel=1e-12)
        assert mix.objective >= best * (1 - 1e-12)
        assert mix.about.endswith(".")
        for members in groups:
            assert len({mix.layers[LAYERS[i].name] for i in members}) == 1


def test_uniform_is_the_widest_width_that_fits() -> None:
    for budget, expected in ((3.99, "int3-g64"), (4.0, "int4-g64"), (7.0, "int6-g64")):
        problem = build_problem(LAYERS, SIX, SCORES, budgets={"average_bits": budget})
        (mix,), warnings = make_baselines(problem, ["uniform"])
        assert set(mix.layers.values()) == {expected}
        assert expected in mix.about
        assert warnings == ()


def test_uniform_obeys_the_tightest_of_several_budgets() -> None:
    limit = SIZE.exact({layer.name: "int3-g64" for layer in LAYERS})
    budgets = {"average_bits": 5.0, "size": limit}
    problem = build_problem(LAYERS, SIX, SCORES, budgets=budgets, sizes=[SIZE])
    (mix,), _ = make_baselines(problem, ["uniform"], size_tables=[SIZE])
    assert set(mix.layers.values()) == {"int3-g64"}
    assert mix.totals.size["plain"] == limit


def test_uniform_takes_the_lower_score_of_two_formats_of_a_width() -> None:
    layers = (Layer("a", "linear", 4, 128, "float32"),)
    formats = ("int4-g128", "int4-g32", "int4-g64")
    problem = build_problem(
        layers, formats, np.array([[3.0, 1.0, 2.0]]), budgets={"average_bits": 4}
    )
    (mix,), _ = make_baselines(problem, ["uniform"])
    assert mix.layers == {"a": "int4-g32"}


def test_uniform_names_layers_that_cannot_take_the_format() -> None:
    layers = (
        Layer("wide", "linear", 4, 128, "float32"),
        Layer("odd", "linear", 4, 100, "float32"),
    )
    formats = ("int3-channel", "int4-g64", "int8-channel")
    scores = np.array([[4.0, 1.0, 0.1], [4.0, np.nan, 0.1]])
    budgets = {"average_bits": 4.0}
    everywhere = build_problem(layers, formats, scores, budgets=budgets)
    (mix,), _ = make_baselines(everywhere, ["uniform"])
    assert mix.layers == {"wide": "int3-channel", "odd": "int3-channel"}
    nowhere = build_problem(
        layers,
        formats,
        scores,
        budgets=budgets,
        available=np.array([[False, True, True], [True, False, True]]),
    )
    (mix,), _ = make_baselines(nowhere, ["uniform"])
    assert mix.layers == {"wide": "int4-g64", "odd": "int3-channel"}
    assert "odd int3-channel" in mix.about


@pytest.mark.parametrize("budget", [3.7, 4.5, 5.5, 7.0])
def test_ends_equals_plain_enumeration_of_its_rule(budget: float) -> None:
    problem = build_problem(LAYERS, SIX, SCORES, budgets={"average_bits": budget})
    mixes, warnings = make_baselines(problem, ["ends"])
    entries = sum(layer.numel for layer in LAYERS)
    candidates = []
    for k, inner in itertools.product((1, 2), SIX[:-1]):
        layers = {
            x.name: "int8-g64" if x.block is None or not k <= x.block < 6 - k else inner
            for x in LAYERS
        }
        bits = sum(x.numel * (parse_format(layers[x.name]).bits or 0) for x in LAYERS)
        if bits <= budget * entries:
            candidates.append((score_of(layers, SCORES), layers))
    if not candidates:
        assert mixes == ()
        assert warnings[0].startswith("baseline ends is left out: ")
        return
    least, expected = min(candidates, key=lambda item: item[0])
    assert mixes[0].objective == pytest.approx(least, rel=1e-12)
    assert mixes[0].layers == expected
    assert "int8-g64" in mixes[0].about


def test_ends_is_left_out_with_a_reason() -> None:
    plain = tuple(Layer(f"l{i}", "linear", 8, 64, "float32") for i in range(2))
    scores = falling_scores(plain, SIX, np.random.default_rng(0))
    no_blocks = build_problem(plain, SIX, scores, budgets={"average_bits": 4})
    no_eight = build_problem(LAYERS, SIX[:5], SCORES[:, :5], budgets={"average_bits": 4})
    tight = build_problem(LAYERS, SIX, SCORES, budgets={"average_bits": 2.1})
    for problem, reason in (
        (no_blocks, "has 2 layers"),
        (no_eight, "none of 8 bits"),
        (tight, "over the budget"),
    ):
        mixes, warnings = make_baselines(problem, ["ends"])
        assert mixes == ()
        assert reason in warnings[0]


def test_weight_error_and_hawq_v2_are_the_optima_of_their_own_tables() -> None:
    problem = build_problem(LAYERS, SIX, SCORES, budgets={"average_bits": 4})
    mixes, _ = baselines(problem)
    for name, table in (("weight-error", ERRORS), ("hawq-v2", TRACES)):
        own = solve(with_scores(problem, table)).objective
        assert score_of(mixes[name].layers, table) == pytest.approx(own, rel=1e-12)
        other = solve(build_problem(LAYERS, SIX, table, budgets={"average_bits": 4}))
        assert mixes[name].layers == problem.mix(other.choice)


def test_unknown_names_missing_tables_and_bad_values_are_refused() -> None:
    problem = build_problem(LAYERS, SIX, SCORES, budgets={"average_bits": 4})
    with pytest.raises(InputError, match="Did you mean 'uniform'"):
        make_baselines(problem, ["uniforms"])
    with pytest.raises(InputError, match="'hawq-v2' needs its table"):
        make_baselines(problem, ["uniform", "hawq-v2"])
    with pytest.raises(NumericalError, match=r"model\.embed_tokens"):
        make_baselines(problem, ["weight-error"], weight_error=np.full(ERRORS.shape, np.nan))


def test_ends_of_a_network_without_a_chain_of_blocks_are_its_first_and_last_layers() -> None:
    """Stages count their blocks anew, so block 0 is both at the start and in the middle."""
    names = ["stem", "stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0", "head"]
    blocks = [None, 0, 1, 0, None]
    layers = tuple(
        Layer(n, "convolution", 8, 64, "float32", b) for n, b in zip(names, blocks, strict=True)
    )
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 5})
    (mix,), warnings = make_baselines(problem, ["ends"])
    assert warnings == ()
    bits = [mix.layers[n].partition("-")[0] for n in names]
    assert bits[0] == bits[-1] == "int8"
    assert set(bits[1:-1]) == {"int3"}
    assert mix.about.startswith("First and last layer in int8")
