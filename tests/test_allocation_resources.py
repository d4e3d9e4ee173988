"""Bit operations, latency, generic costs and explicit groups: against enumeration."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_problems import falling_scores, plain_size_table, random_layers

from hawqkit.allocation import (
    CostTable,
    Problem,
    allocate_table,
    bops_table,
    build_problem,
    exact_costs,
    make_baselines,
    solve,
    solve_by_enumeration,
    sweep_resource,
    totals,
)
from hawqkit.allocation.problem import cost_resource
from hawqkit.allocation.resources import MOST_EXACT, bit_operations
from hawqkit.errors import BudgetError, InputError, Unsupported
from hawqkit.formats import Format, parse_format
from hawqkit.records import Floats, Integers, Layer

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("int2-channel", "int4-channel", "int8-channel")
CONVS = (
    Layer("conv1", "convolution", 8, 27, "float32", macs=27 * 8 * 1024),
    Layer("conv2", "convolution", 16, 72, "float32", macs=72 * 16 * 256),
    Layer("skip", "convolution", 16, 8, "float32", macs=8 * 16 * 256),
    Layer("fc", "linear", 10, 16, "bfloat16", macs=160),
)


def conv_scores(seed: int = 0) -> Floats:
    return falling_scores(CONVS, FORMATS, np.random.default_rng(seed))


def test_bit_operations_are_macs_times_weight_bits_times_activation_bits() -> None:
    stored_32, stored_16 = CONVS[0], CONVS[3]
    w4a8 = Format("w4a8", 4, activation_bits=8)
    assert bit_operations(stored_32, w4a8) == 221_184 * 4 * 8
    assert bit_operations(stored_32, parse_format("int4-channel")) == 221_184 * 4 * 32
    assert bit_operations(stored_16, parse_format("int4-channel")) == 160 * 4 * 16
    assert bit_operations(stored_32, parse_format("none")) == 221_184 * 32 * 32
    assert bit_operations(stored_16, parse_format("none")) == 160 * 16 * 16


def test_a_published_network_has_its_published_bit_operations() -> None:
    # HAWQ-V3 (arXiv 2011.10680), table 1: ResNet18 takes 116 G bit operations in W8A8 and 34 G in
    # W4A4, where the first convolution and the classifier stay at 8 bits.
    figures = json.loads((ROOT / "examples" / "hawq_v3_resnet18.json").read_text())
    inner = [round(x * 1e6) for x in figures["bops_millions"]]
    ends = [64 * 147 * 112 * 112, 512 * 1000]

    def taken(macs: list[int], bits: int) -> int:
        layers = [Layer("l", "convolution", 1, 1, "float32", macs=m) for m in macs]
        return sum(bit_operations(x, Format("wa", bits, activation_bits=bits)) for x in layers)

    assert [(taken(inner, b) + taken(ends, 8)) // 10**9 for b in (8, 4)] == [116, 34]


def test_layers_that_were_not_counted_are_refused_by_name() -> None:
    layers = (*CONVS[:2], Layer("lost", "linear", 4, 4, "float32"))
    with pytest.raises(Unsupported, match=r"1 of 3 layers are not known \(lost\)"):
        bops_table(layers, FORMATS)
    with pytest.raises(Unsupported, match="never counted"):
        build_problem(layers, FORMATS, np.ones((3, 3)), budgets={"bops": 1e9})
    assert totals(layers, dict.fromkeys(["conv1", "conv2", "lost"], FORMATS[0])).bops is None
    build_problem(layers, FORMATS, np.ones((3, 3)), budgets={"average_bits": 4})


def test_an_embedding_multiplies_nothing_but_a_model_of_embeddings_was_not_counted() -> None:
    table = Layer("words", "embedding", 100, 8, "float32")
    assert bops_table([*CONVS, table], FORMATS).costs[4].tolist() == [0, 0, 0]
    with pytest.raises(Unsupported, match="words"):
        bops_table([table], FORMATS)


def test_operations_beyond_64_bits_are_refused_instead_of_wrapping_round() -> None:
    huge = Layer("huge", "linear", 1, 1, "float32", macs=10**17)
    with pytest.raises(InputError, match="64-bit"):
        bops_table([huge], ("none",))


def plain_used(mix: dict[str, str], name: str, latency: dict[tuple[str, str], float]) -> Fraction:
    """What a mix takes, recounted from the layers in exact arithmetic."""
    if name == "bops":
        return Fraction(
            sum(x.macs * parse_format(mix[x.name]).bits * x.dtype_bits for x in CONVS)  # type: ignore[operator]
        )
    if name == "latency_ms":
        return sum((Fraction(repr(latency[x.name, mix[x.name]])) for x in CONVS), Fraction())
    bits = sum(x.numel * parse_format(mix[x.name]).bits for x in CONVS)  # type: ignore[operator]
    return Fraction(bits, sum(x.numel for x in CONVS))


@pytest.mark.parametrize("seed", range(20))
def test_several_budgets_at_once_are_met_by_the_best_mix_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = conv_scores(seed)
    times = {(x.name, f): round(float(rng.uniform(0.01, 2)), 6) for x in CONVS for f in FORMATS}
    cells = [[Fraction(repr(times[x.name, f])) for f in FORMATS] for x in CONVS]
    latency = exact_costs("latency_ms", cells)
    mixes = [
        dict(zip([x.name for x in CONVS], m, strict=True))
        for m in itertools.product(FORMATS, repeat=4)
    ]
    middle = mixes[int(rng.integers(len(mixes)))]
    # Limits that a mix meets to the last digit: off by one in either direction would be seen.
    budgets = {n: float(plain_used(middle, n, times)) for n in ("bops", "latency_ms")}
    budgets["average_bits"] = float(rng.uniform(3, 8))
    fitting = [
        m
        for m in mixes
        if all(plain_used(m, n, times) <= Fraction(repr(x)) for n, x in budgets.items())
    ]
    column = {name: k for k, name in enumerate(FORMATS)}
    best = min(
        (math.fsum(scores[i, column[m[x.name]]] for i, x in enumerate(CONVS)) for m in fitting),
        default=None,
    )
    if best is None:
        with pytest.raises(BudgetError):
            allocate_table(CONVS, FORMATS, scores, budgets=budgets, costs=[latency])
        return
    found = allocate_table(CONVS, FORMATS, scores, budgets=budgets, costs=[latency])
    assert found.solution.objective == pytest.approx(best, rel=1e-12)
    assert found.solution.certificate.bound <= best * (1 + 1e-12)
    assert found.totals.bops == plain_used(found.layers, "bops", times)
    assert found.totals.latency_ms == pytest.approx(
        float(plain_used(found.layers, "latency_ms", times))
    )
    assert solve_by_enumeration(found.problem)[1] == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(15))
def test_every_kind_of_budget_together_agrees_with_enumeration(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layers = tuple(
        Layer(
            x.name,
            x.kind,
            x.rows,
            x.columns,
            x.dtype,
            x.block,
            macs=x.numel * int(rng.integers(1, 50)),
        )
        for x in random_layers(rng, 6)
    )
    formats = ("int2-channel", "int3-g32", "int8-channel")
    scores = falling_scores(layers, formats, rng)
    energy = CostTable("energy", rng.integers(1, 1000, (6, 3)), 100, "J", fixed=250)
    size = plain_size_table(layers, formats, header=0)  # headers are met by steps, not exactly
    problem = build_problem(
        layers, formats, scores, budgets={}, groups={layers[0].name: "t", layers[5].name: "t"}
    )
    free = [np.flatnonzero(row) for row in problem.allowed]
    pick = np.array([rng.choice(columns) for columns in free])
    mix = problem.mix(pick)
    rows = np.arange(6)
    columns = np.array([formats.index(f) for f in mix.values()])
    budgets = {
        "average_bits": 6.0,
        "size": float(size.exact(mix)),
        "bops": float(totals(layers, mix).bops or 0),
        "energy": (250 + int(energy.costs[rows, columns].sum())) / 100,
    }
    limited = build_problem(
        layers, formats, scores, budgets=budgets, sizes=[size], costs=[energy],
        groups={layers[0].name: "t", layers[5].name: "t"},
    )  # fmt: skip
    assert [r.name for r in limited.resources] == list(budgets)
    try:
        _, best = solve_by_enumeration(limited)
    except BudgetError:
        with pytest.raises(BudgetError):
            solve(limited)
        return
    assert solve(limited).objective == pytest.approx(best, rel=1e-12)


def test_tied_layers_get_the_best_common_format() -> None:
    scores = conv_scores()
    budgets = {"average_bits": 4.5}
    groups = {"conv1": "a", "skip": "a", "fc": ""}
    found = allocate_table(CONVS, FORMATS, scores, budgets=budgets, groups=groups)
    assert found.layers["conv1"] == found.layers["skip"]
    assert found.problem.group_names == ("a", "conv2", "fc")
    best = min(
        math.fsum(scores[i, c] for i, c in enumerate(mix))
        for mix in itertools.product(range(3), repeat=4)
        if mix[0] == mix[2]
        and sum(x.numel * (2, 4, 8)[c] for x, c in zip(CONVS, mix, strict=True))
        <= 4.5 * sum(x.numel for x in CONVS)
    )
    assert found.solution.objective == pytest.approx(best, rel=1e-12)


def test_ties_that_overlap_with_the_runtime_make_one_group() -> None:
    names = ["m.q_proj", "m.k_proj", "m.o_proj", "m.up_proj", "m.gate_proj"]
    layers = [Layer(name, "linear", 4, 64, "float32") for name in names]
    problem = build_problem(
        layers, FORMATS, np.ones((5, 3)), runtime="vllm", budgets={},
        groups={"m.o_proj": "x", "m.k_proj": "x", "m.up_proj": "y"},
    )  # fmt: skip
    assert problem.groups == ((0, 1, 2), (3, 4))
    with pytest.raises(InputError, match=r"'m\.o_pro'.*Did you mean 'm\.o_proj'"):
        build_problem(layers, FORMATS, np.ones((5, 3)), budgets={}, groups={"m.o_pro": "x"})


def test_a_tied_group_without_a_common_format_is_refused() -> None:
    available = np.array([[True, False, False], [True] * 3, [False, True, True], [True] * 3])
    with pytest.raises(Unsupported, match="conv1, skip must share a format"):
        build_problem(
            CONVS, FORMATS, conv_scores(), budgets={}, available=available,
            groups={"conv1": "a", "skip": "a"},
        )  # fmt: skip


@pytest.mark.parametrize("name", ["bops", "latency_ms"])
def test_the_least_that_a_refusal_names_can_be_asked_for(name: str) -> None:
    cells = [[Fraction(1, 8) * (i + c + 1) for c in range(3)] for i in range(4)]
    costs = [exact_costs("latency_ms", cells)]
    with pytest.raises(BudgetError) as caught:
        allocate_table(CONVS, FORMATS, conv_scores(), budgets={name: 1e-3}, costs=costs)
    text = str(caught.value).split("at least ")[1].split(" and")[0]
    figure, unit = text.split(" ")
    assert unit == {"bops": "BOPs", "latency_ms": "ms"}[name]
    least = float(figure.replace(",", ""))
    allocate_table(CONVS, FORMATS, conv_scores(), budgets={name: least}, costs=costs)
    with pytest.raises(BudgetError):
        allocate_table(
            CONVS, FORMATS, conv_scores(), budgets={name: least * (1 - 1e-9)}, costs=costs
        )


def test_latency_without_a_table_and_unknown_tables_are_refused() -> None:
    with pytest.raises(BudgetError, match="latency table"):
        allocate_table(CONVS, FORMATS, conv_scores(), budgets={"latency_ms": 3})
    energy = CostTable("energy", np.ones((4, 3), dtype=np.int64))
    with pytest.raises(InputError, match="Did you mean 'energy'"):
        allocate_table(CONVS, FORMATS, conv_scores(), budgets={"enrgy": 3}, costs=[energy])
    wrong = CostTable("energy", np.ones((4, 2), dtype=np.int64))
    with pytest.raises(InputError, match=r"cost table of 'energy' has shape \(4, 2\)"):
        allocate_table(CONVS, FORMATS, conv_scores(), budgets={"energy": 3}, costs=[wrong])


def test_a_limit_beyond_every_integer_limits_nothing() -> None:
    found = allocate_table(
        CONVS, FORMATS, conv_scores(), budgets={"bops": 1e300, "average_bits": 8}
    )
    assert set(found.layers.values()) == {"int8-channel"}


decimals = st.decimals(min_value=0, max_value=10**6, places=9, allow_nan=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(decimals, min_size=2, max_size=2), min_size=1, max_size=5))
def test_costs_are_the_decimals_themselves_where_they_fit(cells: list[list[object]]) -> None:
    amounts = [[Fraction(str(cell)) for cell in row] for row in cells]
    table = exact_costs("x", amounts)
    counted = [[Fraction(int(c), table.scale) for c in row] for row in table.costs]
    assert counted == amounts or sum(max(row) for row in amounts) * table.scale * 10 > MOST_EXACT
    for row, plain in zip(counted, amounts, strict=True):
        for got, wanted in zip(row, plain, strict=True):
            assert wanted <= got < wanted + Fraction(1, table.scale)


def test_digits_beyond_the_solvers_arithmetic_are_rounded_up() -> None:
    third = Fraction(repr(1000 / 3))
    table = exact_costs("x", [[third], [Fraction(10**6)]])
    assert table.scale == 10**8
    assert table.costs.tolist() == [[33333333334], [10**14]]
    with pytest.raises(InputError, match="larger unit"):
        exact_costs("bytes", [[Fraction(10**19)]])


def hull_of(problem: Problem, costs: Integers) -> list[tuple[int, float]]:
    """Every mix as (cost, score), by plain enumeration."""
    columns = [np.flatnonzero(row).tolist() for row in problem.allowed]
    return [
        (
            sum(int(costs[g, f]) for g, f in enumerate(mix)),
            math.fsum(float(problem.scores[g, f]) for g, f in enumerate(mix)),
        )
        for mix in itertools.product(*columns)
    ]


def test_the_swept_frontier_of_any_cost_is_the_lower_hull_of_all_mixes() -> None:
    problem = build_problem(CONVS, FORMATS, conv_scores(3), budgets={})
    table = CostTable("x", np.random.default_rng(3).integers(1, 500, (4, 3)), 10, "ms", fixed=70)
    resource = cost_resource(problem, table, 100.0)
    mixes = hull_of(problem, resource.costs)
    choice = solve(Problem(**{**_fields(problem), "resources": (resource,)})).choice
    trade = sweep_resource(problem, resource, choice)
    assert trade.budget == "x"
    for point in trade.points:
        least = min(s for c, s in mixes if (c + 70) / 10 <= point.taken)
        assert point.score == pytest.approx(least, rel=1e-12)
        assert point.bound == pytest.approx(least, rel=1e-9)
    chosen = trade.chosen
    below = min(s for c, s in mixes if (c + 70) / 10 <= chosen.taken)
    assert chosen.bound <= below * (1 + 1e-12)
    assert chosen.taken == resource.used(choice) / 10
    assert set(trade.uniform) == set(FORMATS)
    with pytest.raises(InputError, match="two ends"):
        sweep_resource(problem, resource, choice, most_points=1)


def _fields(problem: Problem) -> dict[str, object]:
    return {name: getattr(problem, name) for name in Problem.__slots__}


def test_baselines_keep_to_operations_and_latency() -> None:
    cells = [[Fraction(1), Fraction(2), Fraction(4)]] * 4
    costs = [exact_costs("latency_ms", cells)]
    found = allocate_table(
        CONVS, FORMATS, conv_scores(), budgets={"bops": 1e9, "latency_ms": 9.5}, costs=costs
    )
    error = np.array([[3.0, 2.0, 1.0]] * 4)
    mixes, _ = make_baselines(found.problem, ("uniform", "weight-error"), weight_error=error)
    assert [mix.totals.latency_ms for mix in mixes] == [8.0, 9.0]
    assert all((mix.totals.bops or 0) <= 1e9 for mix in mixes)
