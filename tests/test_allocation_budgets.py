from __future__ import annotations

import itertools
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from random_problems import SIX, falling_scores, llama_layers, plain_size_table

from hawqkit.allocation import (
    Problem,
    SizeTable,
    allocate_table,
    build_problem,
    solve,
    totals,
    with_scores,
)
from hawqkit.errors import BudgetError, InputError, NumericalError, Unsupported
from hawqkit.records import Floats, Layer

LAYERS = llama_layers(2)
SCORES = falling_scores(LAYERS, SIX, np.random.default_rng(0))
ENTRIES = sum(layer.numel for layer in LAYERS)


def problem_of(budgets: dict[str, float], **more: object) -> Problem:
    return build_problem(LAYERS, SIX, SCORES, budgets=budgets, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", [4, 4.25, 4.1, 3.3333333, np.float64(2.7)])
def test_average_bits_become_an_integer_without_rounding_up(asked: float) -> None:
    (resource,) = problem_of({"average_bits": asked}).resources
    assert resource.limit == math.floor(Fraction(str(float(asked))) * ENTRIES)
    assert (resource.unit, resource.scale) == ("bits", ENTRIES)


def test_a_decimal_limit_is_met_exactly_where_binary_floats_fall_short() -> None:
    # 2.3 * 100 is 229.99999999999997 in floats: the exact product is 230.
    layers = (Layer("a", "linear", 7, 10, "float32"), Layer("b", "linear", 3, 10, "float32"))
    formats = ("int2-channel", "int3-channel")
    scores = np.array([[9.0, 1.0], [5.0, 1.0]])
    assert math.floor(2.3 * 100) == 229
    choice = solve(build_problem(layers, formats, scores, budgets={"average_bits": 2.3})).choice
    assert choice.tolist() == [0, 1]  # 7 * 10 * 2 + 3 * 10 * 3 = 230 bits


def test_none_counts_its_stored_dtype() -> None:
    layers = (
        Layer("a", "linear", 2, 64, "float32"),
        Layer("b", "linear", 2, 64, "bfloat16"),
    )
    problem = build_problem(layers, ["none"], np.zeros((2, 1)), budgets={"average_bits": 24})
    assert problem.resources[0].costs.tolist() == [[2 * 64 * 32], [2 * 64 * 16]]
    assert totals(layers, {"a": "none", "b": "none"}).average_bits == 24.0


def test_totals_tell_the_three_sizes_apart() -> None:
    layers = (Layer("a", "linear", 2, 128, "float32"), Layer("b", "linear", 2, 64, "float32"))
    table = plain_size_table(layers, ("int4-g64", "int8-g64"), header=8, fixed=1000)
    sizes = totals(layers, {"a": "int4-g64", "b": "int8-g64"}, [table])
    assert sizes.average_bits == (256 * 4 + 128 * 8) / 384
    assert sizes.bits_per_weight == (256 * 4.25 + 128 * 8.25) / 384
    assert sizes.size == {"plain": 1000 + 16 + (256 * 4 + 4 * 16) // 8 + (128 * 8 + 2 * 16) // 8}
    with pytest.raises(InputError, match="no format for 'b'"):
        totals(layers, {"a": "int4-g64"})


def test_an_impossible_budget_says_what_came_and_what_can_be_had() -> None:
    with pytest.raises(BudgetError) as caught:
        solve(problem_of({"average_bits": 1.5}))
    message = str(caught.value)
    assert "average_bits = 1.5" in message
    assert "at least 2 and at most 8" in message
    assert caught.value.exit_code == 2


def test_an_impossible_size_names_bytes_that_can_really_be_had() -> None:
    table = plain_size_table(LAYERS, SIX, header=8)
    smallest = table.exact({layer.name: SIX[0] for layer in LAYERS})
    largest = table.exact({layer.name: SIX[-1] for layer in LAYERS})
    with pytest.raises(BudgetError) as caught:
        solve(problem_of({"size": 5000}, sizes=[table]))
    assert f"at least {smallest:,} bytes and at most {largest:,} bytes" in str(caught.value)
    assert "size = 5,000 bytes" in str(caught.value)
    assert problem_of({"size": smallest}, sizes=[table]).fits(np.zeros(len(LAYERS), dtype=np.int64))


def test_every_impossible_budget_is_named_at_once() -> None:
    with pytest.raises(BudgetError) as caught:
        solve(problem_of({"average_bits": 1.0, "bits_per_weight": 2.1}))
    assert "average_bits = 1 cannot" in str(caught.value)
    assert "bits_per_weight = 2.1 cannot" in str(caught.value)


def test_the_smallest_figure_in_the_message_can_be_asked_for() -> None:
    layers = (Layer("a", "linear", 3, 96, "float32"), Layer("b", "linear", 7, 160, "float32"))
    formats = ("int3-g32-asym", "int8-g32")
    scores = np.array([[1.0, 0.1], [1.0, 0.1]])
    with pytest.raises(BudgetError) as caught:
        solve(build_problem(layers, formats, scores, budgets={"bits_per_weight": 1}))
    least = float(str(caught.value).split("at least ")[1].split(" and")[0])
    solve(build_problem(layers, formats, scores, budgets={"bits_per_weight": least}))
    with pytest.raises(BudgetError):
        solve(build_problem(layers, formats, scores, budgets={"bits_per_weight": least - 0.001}))


def opposite_table(layers: tuple[Layer, ...]) -> SizeTable:
    """A target in which fewer bits take more bytes: 100 for int2, 10 for int8."""
    costs = np.tile(np.array([100, 80, 60, 40, 20, 10]), (len(layers), 1))
    byte = dict(zip(SIX, costs[0].tolist(), strict=True))
    return SizeTable("odd", costs, 5, lambda mix: 5 + sum(byte[f] for f in mix.values()))


def test_two_contradictory_budgets_are_both_named_with_what_each_leaves() -> None:
    layers = tuple(Layer(f"l{i}", "linear", 8, 64, "float32") for i in range(4))
    scores = np.ones((4, 6))
    budgets = {"average_bits": 3.0, "size": 105}
    problem = build_problem(layers, SIX, scores, budgets=budgets, sizes=[opposite_table(layers)])
    with pytest.raises(BudgetError) as caught:
        solve(problem)
    message = str(caught.value)
    assert "average_bits = 3 and size = 105 bytes contradict each other" in message
    assert "the smallest average_bits is 5.75" in message  # 20 + 20 + 20 + 40 bytes: 6 6 6 5 bits
    cells = zip((2, 3, 4, 5, 6, 8), (100, 80, 60, 40, 20, 10), strict=True)
    least = min(
        sum(size for _, size in mix)
        for mix in itertools.product(list(cells), repeat=4)
        if sum(bits for bits, _ in mix) <= 3 * 4
    )
    assert f"the smallest size is {least + 5} bytes" in message


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, "four"])
def test_a_limit_that_is_no_positive_number_is_refused(limit: float) -> None:
    with pytest.raises(BudgetError, match="finite number above 0"):
        problem_of({"average_bits": limit})


def test_unknown_budgets_and_missing_targets_are_refused() -> None:
    with pytest.raises(InputError, match="Did you mean 'average_bits'"):
        problem_of({"average_bit": 4})
    with pytest.raises(BudgetError, match="without a target"):
        problem_of({"size": 10**6})
    with pytest.raises(BudgetError, match="no budget came"):
        allocate_table(LAYERS, SIX, SCORES, budgets={})
    table = plain_size_table(LAYERS, SIX)
    with pytest.raises(InputError, match="Did you mean 'plain'"):
        allocate_table(
            LAYERS, SIX, SCORES, budgets={"size": 10**9}, size_tables=[table], size_target="plein"
        )


def test_empty_or_repeated_names_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="no layers"):
        build_problem([], SIX, np.zeros((0, 6)), budgets={})
    with pytest.raises(InputError, match="no formats"):
        build_problem(LAYERS, [], np.zeros((14, 0)), budgets={})
    with pytest.raises(InputError, match="'int2-g64' came twice"):
        build_problem(LAYERS, ["int2-g64", "int2-g64"], np.zeros((14, 2)), budgets={})
    with pytest.raises(InputError, match=r"shape \(14, 5\)"):
        build_problem(LAYERS, SIX, SCORES[:, :5], budgets={})
    table = plain_size_table(LAYERS[:3], SIX)
    with pytest.raises(InputError, match="size table of 'plain' has shape"):
        problem_of({"size": 10**9}, sizes=[table])


@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_a_score_that_is_no_loss_names_layer_and_format(value: float) -> None:
    scores: Floats = SCORES.copy()
    scores[3, 2] = value
    where = r"layers\.0\.self_attn\.o_proj.*'int4-g64'"
    with pytest.raises(NumericalError, match=where):
        build_problem(LAYERS, SIX, scores, budgets={"average_bits": 4})
    problem = problem_of({"average_bits": 4})
    with pytest.raises(NumericalError, match=where):
        with_scores(problem, scores)


def test_cells_that_are_not_available_are_not_read_and_not_chosen() -> None:
    scores = SCORES.copy()
    scores[3, 2:] = np.nan
    available = np.isfinite(scores)
    problem = build_problem(LAYERS, SIX, scores, budgets={"average_bits": 8}, available=available)
    mix = problem.mix(solve(problem).choice)
    assert mix[LAYERS[3].name] == "int3-g64"
    assert {f for n, f in mix.items() if n != LAYERS[3].name} == {"int8-g64"}


def test_layers_and_groups_without_a_format_are_named() -> None:
    odd = (Layer("odd", "linear", 4, 100, "float32"),)
    with pytest.raises(Unsupported, match=r"'odd' \(100 columns\).*int4-channel"):
        build_problem(odd, SIX, np.full((1, 6), np.nan), budgets={})
    pair = (
        Layer("m.q_proj", "linear", 4, 64, "float32"),
        Layer("m.k_proj", "linear", 4, 64, "float32"),
    )
    available = np.array([[True, False], [False, True]])
    formats = ("int4-g64", "int8-g64")
    with pytest.raises(Unsupported, match=r"m\.q_proj, m\.k_proj must share a format"):
        build_problem(
            pair, formats, np.ones((2, 2)), budgets={}, runtime="vllm", available=available
        )
    build_problem(pair, formats, np.ones((2, 2)), budgets={}, available=available)


def test_allocate_table_hands_back_mix_proof_and_real_sizes() -> None:
    table = plain_size_table(LAYERS, SIX)
    found = allocate_table(
        LAYERS,
        SIX,
        SCORES,
        budgets={"average_bits": 4, "size": 10**9},
        size_tables=[table],
        runtime="vllm",
    )
    assert list(found.layers) == [layer.name for layer in LAYERS]
    assert found.totals == totals(LAYERS, found.layers, [table])
    assert found.totals.average_bits <= 4.0
    columns = [SIX.index(f) for f in found.layers.values()]
    assert found.solution.objective == pytest.approx(SCORES[np.arange(14), columns].sum())
    assert [r.name for r in found.problem.resources] == ["average_bits", "size"]


def test_size_limits_one_target_or_all_of_them() -> None:
    small = plain_size_table(LAYERS, SIX, header=0)
    big = SizeTable(
        "big", small.costs * 2, small.fixed, lambda mix: 2 * small.exact(mix) - small.fixed
    )
    limit = 1000 + ENTRIES  # 8 bits a weight in the big target, so 4 in its own count
    call = {"layers": LAYERS, "formats": SIX, "scores": SCORES, "budgets": {"size": limit}}
    every = allocate_table(**call, size_tables=[small, big])  # type: ignore[arg-type]
    one = allocate_table(**call, size_tables=[small, big], size_target="plain")  # type: ignore[arg-type]
    assert every.totals.size["big"] <= limit < one.totals.size["big"]
    assert one.totals.size["plain"] <= limit


def test_the_room_imports_neither_torch_nor_scipy_before_it_solves() -> None:
    code = (
        "import sys, hawqkit.allocation as a; assert 'scipy' not in sys.modules; "
        "a.solve, a.sweep_frontier, a.make_baselines, a.keep_shares; "
        "assert 'torch' not in sys.modules and 'scipy' in sys.modules; "
        "assert all(hasattr(a, n) for n in a.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    import hawqkit.allocation as room

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = room.nothing
