from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from random_problems import (
    SIX,
    falling_scores,
    llama_layers,
    plain_size_table,
    random_layers,
    weight_bytes,
)

from hawqkit.allocation import Problem, Resource, SizeTable, build_problem, solve
from hawqkit.allocation.brute import solve_by_enumeration
from hawqkit.errors import BudgetError, InputError
from hawqkit.formats import parse_format
from hawqkit.records import Layer

MENU = ("int2-g32", "int3-channel", "int4-g64", "int4-channel-asym", "int8-g32", "none")


def random_problem(seed: int) -> Problem:
    """Up to 8 layers, 2 to 6 formats, holes, groups, one to three budgets."""
    rng = np.random.default_rng(seed)
    layers = random_layers(rng, int(rng.integers(1, 7)))
    formats = sorted({"int3-channel", "none", *rng.choice(MENU, int(rng.integers(1, 5)))})
    unit = float(10.0 ** rng.integers(-12, 3))
    scores = falling_scores(layers, formats, rng, unit)
    scores *= np.exp(rng.normal(0.0, 1.0, scores.shape))  # also not monotone in the bits
    if seed % 3 == 0:
        scores = np.round(scores / unit * 20) / 20 * unit  # ties
    available = rng.random(scores.shape) < 0.9
    available[:, formats.index("int3-channel")] = True
    budgets: dict[str, float] = {}
    for name, limit in (
        ("average_bits", rng.uniform(3.0, 20.0)),
        ("bits_per_weight", rng.uniform(3.5, 24.0)),
        ("size", 1000 + rng.uniform(0.4, 3.0) * sum(layer.numel for layer in layers)),
    ):
        if rng.random() < 0.6 or (not budgets and name == "size"):
            budgets[name] = float(np.round(limit, 3))
    return build_problem(
        layers,
        formats,
        scores,
        runtime=str(rng.choice(["transformers", "vllm"])),
        budgets=budgets,
        sizes=[plain_size_table(layers, formats, header=0)],
        available=available,
    )


@pytest.mark.parametrize("block", range(10))
def test_equals_brute_force_on_random_problems(block: int) -> None:
    solved = 0
    for seed in range(40 * block, 40 * block + 40):
        problem = random_problem(seed)
        try:
            _, least = solve_by_enumeration(problem)
        except BudgetError:
            with pytest.raises(BudgetError):
                solve(problem)
            continue
        solution = solve(problem)
        # Sums of at most 8 numbers in another order: 1e-12 is far above their rounding.
        assert solution.objective == pytest.approx(least, rel=1e-12, abs=1e-300)
        assert solution.certificate.bound <= solution.objective
        assert solution.certificate.bound <= least * (1 + 1e-12)
        assert solution.certificate.relative_gap <= 1e-9
        assert all(excess <= 0 for excess in problem.excess(solution.choice))
        assert problem.allowed[np.arange(len(problem.groups)), solution.choice].all()
        solved += 1
    assert solved >= 20


@pytest.mark.parametrize("resources", [1, 2, 3])
def test_equals_brute_force_with_arbitrary_integer_costs(resources: int) -> None:
    outcomes = {"solved": 0, "impossible": 0}
    for seed in range(60):
        rng = np.random.default_rng(1000 * resources + seed)
        groups, formats = int(rng.integers(2, 7)), int(rng.integers(2, 5))
        layers = tuple(Layer(f"l{i}", "linear", 4, 32, "float32") for i in range(groups))
        tables = [
            rng.integers(1, 10 ** int(rng.integers(1, 10)), (groups, formats))
            for _ in range(resources)
        ]
        problem = Problem(
            layers,
            tuple((i,) for i in range(groups)),
            tuple(layer.name for layer in layers),
            SIX[:formats],
            rng.random((groups, formats)) * 1e-9,
            np.ones((groups, formats), dtype=np.bool_),
            tuple(
                Resource(
                    f"r{i}", t, 7, 7 + int(t.mean(axis=1).sum() * rng.uniform(0.6, 1.2)), "bytes"
                )
                for i, t in enumerate(tables)
            ),
        )
        try:
            _, least = solve_by_enumeration(problem)
        except BudgetError:
            with pytest.raises(BudgetError):
                solve(problem)
            outcomes["impossible"] += 1
            continue
        solution = solve(problem)
        assert solution.objective == pytest.approx(least, rel=1e-12)
        assert problem.fits(solution.choice)
        outcomes["solved"] += 1
    assert outcomes["solved"] >= 20
    assert resources == 1 or outcomes["impossible"] >= 1


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1.0, 1e9])
def test_the_unit_of_the_scores_does_not_change_the_mix(unit: float) -> None:
    layers = llama_layers(12)
    scores = falling_scores(layers, SIX, np.random.default_rng(5))
    plain = solve(build_problem(layers, SIX, scores, budgets={"average_bits": 3.7}))
    scaled = solve(build_problem(layers, SIX, scores * unit, budgets={"average_bits": 3.7}))
    assert (scaled.choice == plain.choice).all()
    assert scaled.certificate.relative_gap <= 1e-12


def test_budgets_are_recounted_from_the_formats() -> None:
    layers = llama_layers(4)
    entries = sum(layer.numel for layer in layers)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        limit = round(float(rng.uniform(2.0, 7.9)), 3)
        problem = build_problem(
            layers, SIX, falling_scores(layers, SIX, rng), budgets={"average_bits": limit}
        )
        mix = problem.mix(solve(problem).choice)
        bits = sum((parse_format(mix[x.name]).bits or 0) * x.numel for x in layers)
        assert bits * 1000 <= round(limit * 1000) * entries
        # The table has a step for every layer: next to nothing is left unused.
        assert bits >= (limit - 0.2) * entries


def test_real_bytes_hold_although_headers_are_not_in_the_table() -> None:
    layers = llama_layers(3)
    lowered = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        table = plain_size_table(layers, SIX, header=int(rng.integers(1, 40_000)))
        limit = int(1000 + rng.uniform(0.3, 1.0) * sum(layer.numel for layer in layers))
        problem = build_problem(
            layers,
            SIX,
            falling_scores(layers, SIX, rng),
            budgets={"size": limit},
            sizes=[table],
        )
        solution = solve(problem)
        mix = problem.mix(solution.choice)
        assert table.exact(mix) <= limit
        assert table.exact(mix) > weight_bytes(layers, mix)
        assert solution.certificate.bound <= solution.objective
        lowered += "lowered" in solution.certificate.status
    assert lowered >= 1


def test_the_smallest_size_can_be_asked_for_exactly() -> None:
    layers = llama_layers(2)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    table = plain_size_table(layers, SIX, header=64)
    least = table.exact({layer.name: SIX[0] for layer in layers})
    build = {"layers": layers, "formats": SIX, "scores": scores, "sizes": [table]}
    problem = build_problem(**build, budgets={"size": least})  # type: ignore[arg-type]
    assert set(problem.mix(solve(problem).choice).values()) == {SIX[0]}
    with pytest.raises(BudgetError, match=f"at least {least:,} bytes"):
        solve(build_problem(**build, budgets={"size": least - 1}))  # type: ignore[arg-type]


def test_a_header_that_no_mix_can_pay_is_an_error() -> None:
    layers = llama_layers(1)
    table = plain_size_table(layers, SIX)
    smallest = {layer.name: SIX[0] for layer in layers}

    def grown(mix: object) -> int:
        return table.exact(smallest) + (0 if mix == smallest else 10**9)

    odd = SizeTable("odd", table.costs, table.fixed, grown)
    scores = falling_scores(layers, SIX, np.random.default_rng(1))
    limit = table.exact(smallest) + 100_000
    problem = build_problem(layers, SIX, scores, budgets={"size": limit}, sizes=[odd])
    with pytest.raises(BudgetError, match="headers included"):
        solve(problem)


def test_equal_layers_give_the_wider_formats_to_the_earlier_ones() -> None:
    layers = tuple(Layer(f"l{i}", "linear", 8, 64, "float32") for i in range(6))
    scores = np.tile([8.0, 2.0, 0.5], (6, 1))
    formats = ("int2-g64", "int4-g64", "int8-g64")
    problem = build_problem(layers, formats, scores, budgets={"average_bits": 10 / 3})
    choice = solve(problem).choice
    assert choice.tolist() == sorted(choice.tolist(), reverse=True)
    assert solve(problem).objective == pytest.approx(solve_by_enumeration(problem)[1])


def test_of_equal_scores_the_cheaper_format_is_taken() -> None:
    layers = tuple(Layer(f"l{i}", "linear", 8, 64, "float32") for i in range(3))
    problem = build_problem(layers, SIX, np.zeros((3, 6)), budgets={"average_bits": 8})
    solution = solve(problem)
    assert solution.choice.tolist() == [0, 0, 0]
    assert (solution.objective, solution.certificate.bound) == (0.0, 0.0)
    assert solution.certificate.relative_gap == 0.0


def test_the_same_input_gives_the_same_mix() -> None:
    layers = llama_layers(10)
    scores = np.round(falling_scores(layers, SIX, np.random.default_rng(2)), 2)
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 3.5})
    choices = {tuple(solve(problem).choice.tolist()) for _ in range(3)}
    assert len(choices) == 1


@pytest.mark.parametrize("limit", [2.0, 3.0, 3.99, 8.0, 100.0])
def test_a_single_layer_takes_the_best_format_within_the_budget(limit: float) -> None:
    layers = (Layer("only", "linear", 16, 128, "float32"),)
    scores = np.array([[4.0, 1.0, 0.3, 0.1, 0.02, 0.001]])
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": limit})
    widths = [2, 3, 4, 5, 6, 8]
    expected = max(i for i, w in enumerate(widths) if w <= limit)
    assert solve(problem).choice.tolist() == [expected]


def test_a_single_format_is_the_answer_or_an_error() -> None:
    layers = llama_layers(2)
    scores = np.full((len(layers), 1), 0.25)
    problem = build_problem(layers, ["int4-g64"], scores, budgets={"average_bits": 4})
    solution = solve(problem)
    assert solution.choice.tolist() == [0] * len(layers)
    assert solution.objective == 0.25 * len(layers)
    assert solution.certificate.bound == solution.objective
    with pytest.raises(BudgetError, match="at least 4 and at most 4"):
        solve(build_problem(layers, ["int4-g64"], scores, budgets={"average_bits": 3.9}))


def test_layers_that_vllm_fuses_share_a_format_at_the_true_optimum() -> None:
    layers = llama_layers(1)
    formats = ("int2-g64", "int4-g64", "int8-g64")
    scores = falling_scores(layers, formats, np.random.default_rng(9))
    problem = build_problem(layers, formats, scores, budgets={"average_bits": 4.5}, runtime="vllm")
    solution = solve(problem)
    mix = problem.mix(solution.choice)
    q, k, v, _, gate, up, _ = (mix[layer.name] for layer in layers)
    assert q == k == v
    assert gate == up
    assert len(problem.groups) == 4
    assert solution.objective == pytest.approx(solve_by_enumeration(problem)[1], rel=1e-12)
    free = solve(build_problem(layers, formats, scores, budgets={"average_bits": 4.5}))
    assert free.objective <= solution.objective


def test_a_gap_is_honored_and_named() -> None:
    layers = llama_layers(20)
    scores = falling_scores(layers, SIX, np.random.default_rng(4))
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 3.3})
    exact, loose = solve(problem), solve(problem, gap=0.05)
    assert exact.objective <= loose.objective <= exact.objective * 1.06
    assert loose.certificate.bound <= exact.objective * (1 + 1e-12)
    assert exact.certificate.status == "optimal"


def test_a_time_limit_that_is_reached_leaves_a_valid_mix_and_bound() -> None:
    layers = llama_layers(30)
    rng = np.random.default_rng(6)
    layers = tuple(replace(x, rows=x.rows + int(rng.integers(0, 60))) for x in layers)
    scores = falling_scores(layers, SIX, rng)
    problem = build_problem(layers, SIX, scores, budgets={"average_bits": 3.5})
    best = solve(problem)
    cut = solve(problem, time_limit=0.0)
    assert problem.fits(cut.choice)
    assert cut.certificate.bound <= best.objective * (1 + 1e-12)
    assert cut.objective >= best.objective * (1 - 1e-12)
    assert cut.certificate.status == "time limit"


def test_no_budget_takes_the_lowest_score_of_every_layer() -> None:
    layers = llama_layers(3)
    scores = np.random.default_rng(0).random((len(layers), 6))
    choice = solve(build_problem(layers, SIX, scores, budgets={})).choice
    assert (choice == scores.argmin(axis=1)).all()


def test_210_layers_and_6_formats_are_fast() -> None:
    layers = llama_layers(30)
    times = []
    for seed in range(3):
        scores = falling_scores(layers, SIX, np.random.default_rng(seed))
        problem = build_problem(layers, SIX, scores, budgets={"average_bits": 4.0})
        start = time.perf_counter()
        certificate = solve(problem).certificate
        times.append(time.perf_counter() - start)
        assert certificate.relative_gap <= 1e-12
        assert (certificate.groups, certificate.variables) == (210, 1260)
    assert min(times) < 2.0  # 0.02 s on an idle core; benchmarks/allocation.py measures


STRAY = """
import sys
import numpy as np
from hawqkit.allocation import build_problem, solve
from random_problems import SIX, falling_scores, llama_layers
for seed, bits in ((17, 3.5), (19, 4.5)):
    scores = falling_scores(llama_layers(30), SIX, np.random.default_rng(seed))
    solve(build_problem(llama_layers(30), SIX, scores, budgets={"average_bits": bits},
                        runtime="vllm"))
print("done")
"""


def test_the_solver_writes_nothing_to_standard_output() -> None:
    # In a process of its own: C's buffer reaches a pipe only when the process ends.
    run = subprocess.run(
        [sys.executable, "-c", STRAY],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        timeout=60,
    )
    assert run.stdout == "done\n"


def test_too_many_mixes_for_enumeration_are_refused() -> None:
    layers = llama_layers(30)
    scores = falling_scores(layers, SIX, np.random.default_rng(0))
    with pytest.raises(InputError, match="too many"):
        solve_by_enumeration(build_problem(layers, SIX, scores, budgets={"average_bits": 4}))
