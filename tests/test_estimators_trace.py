from __future__ import annotations

import numpy as np
import pytest
import torch
from spectra import projector, rotated

from hawqkit.curvature.operator import CallableOperator, MatrixOperator
from hawqkit.errors import InputError
from hawqkit.estimators.probes import draw_probe, draw_probes, seeded
from hawqkit.estimators.traces import frobenius_norm, trace, trace_and_norm

FALLING = 1 / np.arange(1.0, 61.0)


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "spherical"])
def test_probes_have_unit_covariance_and_their_own_shape(kind: str) -> None:
    V = draw_probes(6, 4000, kind, seeded(3))
    torch.testing.assert_close(
        V.T @ V / 4000, torch.eye(6, dtype=V.dtype), atol=0.09, rtol=0
    )  # 4 standard errors of a mean of 4,000 products with variance up to 2
    if kind == "rademacher":
        assert set(V.unique().tolist()) == {-1.0, 1.0}
    if kind == "spherical":
        torch.testing.assert_close(V.norm(dim=1), torch.full((4000,), 6**0.5, dtype=V.dtype))


def test_a_probe_depends_on_its_place_and_not_on_dtype_or_batch() -> None:
    together = draw_probes(9, 3, "gaussian", seeded(1))
    generator = seeded(1)
    one_by_one = [draw_probe(9, "gaussian", generator) for _ in range(3)]
    assert torch.equal(together, torch.stack(one_by_one))
    halved = draw_probes(9, 3, "gaussian", seeded(1), dtype=torch.float32)
    assert torch.equal(halved, together.float())


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "spherical"])
def test_hutchinson_intervals_cover_92_to_98_percent(kind: str) -> None:
    A = rotated(FALLING)
    runs = [trace(A, products=64, probes=kind, batch=64, seed=s) for s in range(400)]
    share = np.mean([run.covers(float(FALLING.sum())) for run in runs])
    assert 0.92 <= share <= 0.98
    errors = np.array([run.value for run in runs]) - FALLING.sum()
    assert abs(errors.mean()) < 4 * errors.std() / 20  # unbiased
    assert np.mean([run.stderr for run in runs]) == pytest.approx(errors.std(), rel=0.1)


def test_hutchinson_intervals_cover_where_the_run_stops_by_itself() -> None:
    values = 1 / np.sqrt(np.arange(1.0, 61.0))
    A = rotated(values)
    runs = [trace(A, relative_error=0.02, batch=8, seed=s) for s in range(400)]
    assert 0.92 <= np.mean([run.covers(float(values.sum())) for run in runs]) <= 0.98
    assert all(run.relative_error <= 0.02 and not run.note for run in runs)
    assert 30 < np.mean([run.products for run in runs]) < 120


def test_frobenius_norm_covers_and_costs_the_same_products_as_the_trace() -> None:
    A = rotated(FALLING)
    truth = float(np.sqrt((FALLING**2).sum()))
    runs = [frobenius_norm(A, products=64, batch=64, seed=s) for s in range(400)]
    assert 0.90 <= np.mean([run.covers(truth) for run in runs]) <= 0.98  # skewed samples
    op = MatrixOperator(A)
    t, norm = trace_and_norm(op, products=20, seed=5)
    assert op.products == t.products == norm.products == 20
    assert norm == frobenius_norm(A, products=20, seed=5)
    assert t == trace(A, products=20, seed=5)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_sketches_are_unbiased_and_better_than_hutchinson_on_falling_spectra(method: str) -> None:
    A, truth = rotated(FALLING), float(FALLING.sum())
    found = [trace(A, products=48, method=method, seed=s, batch=24) for s in range(100)]
    errors = np.array([e.value for e in found]) - truth
    assert abs(errors.mean()) < 4 * errors.std() / 10
    plain = np.array([trace(A, products=48, seed=s, batch=48).value for s in range(100)]) - truth
    assert errors.std() < plain.std() / 2
    assert all(e.interval is None and "error estimate" in e.note for e in found)
    assert all(e.products <= 48 for e in found)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_sketches_do_not_depend_on_how_they_grow(method: str) -> None:
    A = rotated(FALLING)
    whole = trace(A, products=48, method=method, batch=24, seed=1)
    grown = trace(
        A, products=48, method="xtrace" if method == "xtrace" else method, batch=4, seed=1
    )
    if method == "xtrace":
        assert grown.value == pytest.approx(whole.value, rel=1e-10)
    else:  # sketch and rest take turns at the same stream, so only the law is the same
        assert grown.value == pytest.approx(whole.value, abs=6 * (grown.stderr + whole.stderr))
    assert grown.products == whole.products


def test_xtrace_equals_its_definition() -> None:
    A, n, k = rotated(FALLING), 60, 9
    V = draw_probes(n, k, "spherical", seeded(4))
    values = []
    for i in range(k):
        others = torch.cat([V[:i], V[i + 1 :]])
        Q = torch.linalg.qr(A @ others.T)[0]
        rest = V[i] - Q @ (Q.T @ V[i])
        scale = (n - k + 1) / (rest @ rest)
        values.append(float(torch.trace(Q.T @ A @ Q) + scale * (rest @ A @ rest)))
    found = trace(A, method="xtrace", products=2 * k, batch=k, seed=4)
    assert found.value == pytest.approx(np.mean(values), rel=1e-10)
    assert found.stderr == pytest.approx(np.std(values, ddof=1) / 3, rel=1e-8)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_a_sketch_that_holds_the_range_is_exact(method: str) -> None:
    found = trace(projector(50, 4), method=method, products=60)
    assert found.value == pytest.approx(4, abs=1e-10)
    assert found.stderr == 0
    assert found.products < 60
    full = trace(rotated(np.linspace(-1, 2, 7)), method=method, products=60)
    assert full.value == pytest.approx(3.5, abs=1e-10)


def test_the_budget_and_the_relative_error_are_kept() -> None:
    op = MatrixOperator(rotated(FALLING))
    found = trace(op, relative_error=1e-3, products=50)
    assert op.products == found.products == 50
    assert "0.001 was asked" in found.note
    loose = trace(op, relative_error=0.2, products=5000)
    assert loose.relative_error < 0.2
    assert loose.products < 100
    for method in ("xtrace", "hutch++"):
        assert trace(op, method=method, relative_error=0.05).relative_error < 0.05


def test_negative_traces_are_reported_and_results_depend_on_the_seed_alone() -> None:
    A = rotated(-FALLING)
    assert trace(A, products=32).value < 0
    assert trace(A, products=32, seed=2) == trace(A, products=32, seed=2)
    assert trace(A, products=32, seed=2) != trace(A, products=32, seed=3)
    by_batch = [trace(A, products=30, seed=2, batch=b).value for b in (1, 7)]
    assert by_batch[0] == pytest.approx(by_batch[1], rel=1e-12)


def test_a_function_that_returns_its_argument_is_multiplied_safely() -> None:
    identity = CallableOperator(lambda v: v, 5)
    assert trace(identity, products=4).value == 5
    assert trace(identity, products=4, method="xtrace").value == pytest.approx(5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "hutchinsen"}, "Did you mean 'hutchinson'"),
        ({"probes": "normal"}, "rademacher, gaussian, spherical"),
        ({"products": 1}, "too few for a standard error"),
        ({"products": 3, "method": "xtrace"}, "give 4 or more"),
        ({"relative_error": 0.0}, "positive"),
        ({"batch": 0, "products": 4}, "batch"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        trace(torch.eye(3), **options)  # type: ignore[arg-type]
