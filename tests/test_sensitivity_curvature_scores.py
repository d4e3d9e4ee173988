"""The scores of the true Hessian: formulas over shards, signs, errors and risk."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import synthetic

from hawqkit.errors import InputError
from hawqkit.pipeline.choosing import ChoiceSettings, choose
from hawqkit.records import Curvature, Sensitivities, to_array
from hawqkit.sensitivity.curvature_scores import (
    CURVATURE_SCORES,
    evaluate_curvature,
    layer_eigenvalues_of,
    layer_traces_of,
    with_curvature,
    without_curvature,
)


def made_up(traces: Any, eigenvalues: Any, counts: tuple[int, ...]) -> Curvature:
    table = tuple(tuple(map(float, row)) for row in traces)
    tops = tuple(tuple(map(float, row)) for row in eigenvalues)
    errors = tuple(tuple(0.1 for _ in row) for row in table)
    rows = tuple((i,) for i in range(len(counts)))
    return Curvature(rows, 8, counts, 0.1, table, errors, tops, errors)


@pytest.fixture
def table() -> Sensitivities:
    return synthetic.make_run(blocks=1).sensitivities


def test_formulas_of_both_scores_over_shards(table: Sensitivities) -> None:
    rng = np.random.default_rng(0)
    traces, tops = rng.uniform(1, 2, (3, 7)), rng.uniform(-2, 2, (3, 7))
    curvature = made_up(traces, tops, (10, 20, 30))
    found = with_curvature(table, curvature)
    numel = np.array([layer.numel for layer in table.layers])[:, None]
    error = to_array(table.weight_error)
    weighted = (traces * np.array([[10], [20], [30]])).sum(0)[:, None] / 60
    values = to_array(found.scores["hessian-trace"].values)
    np.testing.assert_allclose(values, 0.5 * weighted / numel * error, rtol=1e-12)
    mean, std = tops.mean(0)[:, None], tops.std(0, ddof=1)[:, None]
    values = to_array(found.scores["top-eigenvalue"].values)
    np.testing.assert_allclose(values, 0.5 * np.abs(mean) * error, rtol=1e-12)
    stderr = to_array(found.scores["top-eigenvalue"].stderr)
    np.testing.assert_allclose(stderr, 0.5 * std / 3**0.5 * error, rtol=1e-12)
    assert without_curvature(found) == table
    with_it = with_curvature(found, curvature)
    assert with_it == found


def test_the_error_of_a_trace_is_that_over_shards_and_at_least_the_probes() -> None:
    apart = made_up([[1.0], [3.0]], [[1.0], [1.0]], (10, 10))
    assert layer_traces_of(apart)[1] == pytest.approx([1.0])  # sqrt of (2^2 / 2) / 2
    equal = made_up([[2.0], [2.0]], [[1.0], [1.0]], (10, 10))
    assert layer_traces_of(equal)[1] == pytest.approx([0.1 / 2**0.5])
    single = made_up([[2.0]], [[1.0]], (10,))
    assert layer_traces_of(single)[1] == pytest.approx([0.1])
    assert np.isnan(layer_eigenvalues_of(single)[1]).all()


def test_what_is_known_too_roughly_is_said(table: Sensitivities) -> None:
    traces = np.full((2, 7), 10.0)
    traces[:, 1], traces[:, 3] = (1.0, 1.0), (-1.0, 2.0)
    curvature = made_up(traces, np.ones((2, 7)), (10, 10))  # errors of probes: 0.1 a shard
    curvature = dataclasses.replace(curvature, relative_error=0.05)
    names = [layer.name for layer in table.layers]
    said = "\n".join(with_curvature(table, curvature).warnings)
    assert f"is above 0.05 of the trace's magnitude: {names[1]}, {names[3]}. More probes" in said
    assert "in 1 of 7 layers the trace is within two standard errors of zero" in said
    assert said.endswith(f"so that it hardly decides: {names[3]}.")


def test_a_negative_trace_scores_zero_and_is_kept_and_said(table: Sensitivities) -> None:
    traces, tops = np.ones((2, 7)), np.ones((2, 7))
    traces[:, 2], tops[:, 4], tops[:, 5] = -3.0, -2.0, (-1.0, 2.0)
    found = with_curvature(table, made_up(traces, tops, (10, 10)))
    scores = {name: to_array(found.scores[name].values) for name in CURVATURE_SCORES}
    assert not scores["hessian-trace"][2].any()
    assert (scores["hessian-trace"][[0, 1, 3, 4, 5, 6]] > 0).all()
    assert (scores["top-eigenvalue"] > 0).all()
    assert found.curvature is not None
    assert found.curvature.traces[0][2] == -3.0
    names = [layer.name for layer in table.layers]
    said = "\n".join(found.warnings)
    assert f"below zero, and their score is zero: {names[2]} -3 +- " in said
    assert f"magnitude is negative, and its magnitude counts: {names[4]} -2." in said
    assert "sign changes from shard to shard, so that the mean is small and the" in said
    assert said.endswith(f"risk 1 adds it: {names[5]}.")
    for name in CURVATURE_SCORES:  # a row of zeros is no obstacle to the solver
        choose(found, ChoiceSettings({"average_bits": 4.0}, score=name))


def test_risk_one_turns_the_top_eigenvalue_into_q_bert(table: Sensitivities) -> None:
    rng = np.random.default_rng(1)
    tops = rng.uniform(0.1, 3, (4, 7))
    found = with_curvature(table, made_up(rng.uniform(1, 2, (4, 7)), tops, (5, 5, 5, 5)))
    by_risk = ChoiceSettings({"average_bits": 4.0}, score="top-eigenvalue", risk=1.0)
    allocation, _ = choose(found, by_risk)
    q_bert = (
        0.5 * (np.abs(tops.mean(0)) + tops.std(0, ddof=1))[:, None] * to_array(table.weight_error)
    )
    columns = [table.formats.index(allocation.layers[x.name]) for x in table.layers]
    assert allocation.objective == pytest.approx(q_bert[np.arange(7), columns].sum(), rel=1e-9)


def test_risk_on_the_hessian_trace_is_that_of_random_rounding(table: Sensitivities) -> None:
    found = with_curvature(table, made_up(np.ones((2, 7)), np.ones((2, 7)), (5, 5)))
    allocation, _ = choose(
        found, ChoiceSettings({"average_bits": 4.0}, score="hessian-trace", risk=2.0)
    )
    values = to_array(found.scores["hessian-trace"].values)
    ratios = to_array(table.participation_ratio)[:, None]
    expected = values * (1 + 2 * np.sqrt(2 / ratios))
    columns = [table.formats.index(allocation.layers[x.name]) for x in table.layers]
    assert allocation.objective == pytest.approx(expected[np.arange(7), columns].sum(), rel=1e-9)


def test_one_shard_has_no_deviation_and_says_so(table: Sensitivities) -> None:
    found = with_curvature(table, made_up(np.ones((1, 7)), np.ones((1, 7)), (5,)))
    assert found.scores["top-eigenvalue"].stderr[0][0] is None
    with pytest.raises(InputError, match=r"curvature\.shards to 2 or more"):
        choose(found, ChoiceSettings({"average_bits": 4.0}, score="top-eigenvalue", risk=1.0))


def test_a_score_that_was_not_measured_says_how_to_get_it(table: Sensitivities) -> None:
    with pytest.raises(InputError, match=r"sensitivity\.also=\[hessian-trace\]"):
        choose(table, ChoiceSettings({"average_bits": 4.0}, score="hessian-trace"))


def test_a_format_that_does_not_fit_has_no_score_and_no_rounding_has_no_loss() -> None:
    error = np.array([[0.0, 2.0], [np.nan, 4.0]])
    pair = made_up([[6.0, 8.0]] * 2, [[1.0, 1.0]] * 2, (5, 5))
    found = evaluate_curvature("hessian-trace", pair, np.array([3.0, 4.0]), error)
    np.testing.assert_allclose(found.values, [[0.0, 2.0], [np.nan, 4.0]])
