from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from spectra import projector, rotated

import hawqkit.estimators.densities as module
from hawqkit.curvature.operator import CallableOperator, MatrixOperator
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.densities import density
from hawqkit.estimators.eigenpairs import top_eigenpairs
from hawqkit.estimators.probes import draw_probe, seeded
from hawqkit.records import Density
from hawqkit.records.quadrature import bound_below, gauss_rule
from hawqkit.store import read_arrays, write_arrays

N = 80
SHAPES = {
    "falling": 1 / np.arange(1.0, N + 1),
    "indefinite": np.concatenate([np.linspace(-0.5, 0.5, N - 6), [2.0, 3.0, 4.0, 5.0, -2.0, -3.0]]),
    "few and zeros": np.concatenate([[1.0, 2.0, 4.0], np.zeros(N - 3)]),
}


def start(n: int, seed: int, draw: int) -> torch.Tensor:
    v = draw_probe(n, "gaussian", seeded(seed, draw))
    return v / v.norm()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_each_draw_gives_its_own_moments(batch: int, reorthogonalize: bool) -> None:
    A = rotated(SHAPES["indefinite"])
    found = density(A, steps=6, draws=4, seed=7, batch=batch, reorthogonalize=reorthogonalize)
    nodes, weights = found.nodes_and_weights()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)
    for draw in range(4):
        u = start(N, 7, draw)
        v = u.clone()
        for power in range(1, 12):  # 2 m - 1 = 11
            v = A @ v
            expected = float(u @ v)
            assert (weights[draw] * nodes[draw] ** power).sum() == pytest.approx(expected, rel=1e-9)


def test_moments_are_those_of_the_matrix_within_their_errors() -> None:
    values = SHAPES["indefinite"]
    found = density(rotated(values), steps=20, draws=40, batch=40)
    for j, moment in enumerate(found.moments(5), start=1):
        assert abs(moment.value - (values**j).mean()) < 4 * moment.stderr
    with pytest.raises(InputError, match="moments"):
        density(rotated(values), steps=3, draws=1).moments(6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("known", [0, 3])
def test_intervals_of_counts_and_masses_cover_93_percent_or_more(shape: str, known: int) -> None:
    values, seeds, draws = SHAPES[shape], 400, 8
    A = rotated(values)
    pairs = top_eigenpairs(A, known) if known else None
    # Draws are independent, so those of all seeds are measured side by side.
    whole = density(A, steps=12, draws=seeds * draws, batch=800, deflated=pairs)
    cut, low, high = 0.3, -0.1, 0.05
    above = int((np.abs(values) >= cut).sum())
    between = float(((values >= low) & (values <= high)).mean())
    hits = np.zeros((seeds, 2))
    for seed in range(seeds):
        own = slice(seed * draws, (seed + 1) * draws)
        found = replace(
            whole,
            alphas=whole.alphas[own],
            betas=whole.betas[own],
            complete=whole.complete[own],
        )
        hits[seed] = found.count_above(cut).covers(above), found.mass(low, high).covers(between)
    assert (hits.mean(0) >= 0.93).all(), hits.mean(0)


def test_counts_are_unbiased_within_their_errors_and_have_the_error_of_theory() -> None:
    values = np.where(np.arange(N) < 20, 1.0, 0.0)
    found = density(rotated(values), steps=5, draws=400, batch=400)
    count = found.count_above(0.5)
    assert abs(count.value - 20) < 4 * count.stderr
    theory = np.sqrt(2 * 20 * 60 / (N + 2) / 400)
    assert count.stderr == pytest.approx(theory, rel=0.15)
    one = replace(
        found, alphas=found.alphas[:1], betas=found.betas[:1], complete=found.complete[:1]
    )
    alone = one.count_above(0.5)
    assert alone.stderr == pytest.approx(theory * 20, rel=0.3)
    assert alone.covers(20)


def test_bounds_of_the_distribution_function_hold_for_each_draw() -> None:
    values = np.sort(SHAPES["falling"])
    A = rotated(values)
    eigenvalues, vectors = torch.linalg.eigh(A)
    found = density(A, steps=9, draws=30, seed=2, batch=30, reorthogonalize=True)
    weights = torch.stack([(vectors.T @ start(N, 2, d)) ** 2 for d in range(30)]).numpy()
    for x in [0.011, 0.0145, 0.02, 0.05, 0.21, 0.4, 0.7, 1.4, -1.0]:
        truth = (weights * (eigenvalues.numpy() < x)).sum(1)
        lower, upper = bound_below(found.alphas, found.betas, found.complete, x)
        assert (lower <= truth + 1e-9).all()
        assert (truth - 1e-9 <= upper).all()
        assert (upper - lower).mean() < 0.6


def test_an_exhausted_draw_is_complete_and_exact() -> None:
    found = density(projector(40, 8), steps=30, draws=3)
    assert found.complete.all()
    nodes, weights = found.nodes_and_weights()
    assert (np.isfinite(found.alphas).sum(1) == 2).all()
    support = weights > 1e-12
    assert (support.sum(1) == 2).all()
    np.testing.assert_allclose(np.sort(nodes[0][support[0]]), [0, 1], atol=1e-12)
    lower, upper = bound_below(found.alphas, found.betas, found.complete, 0.5)
    np.testing.assert_allclose(lower, upper)


def test_a_gauss_rule_integrates_what_legendre_does() -> None:
    k = np.arange(1, 6)
    betas = k / np.sqrt(4 * k**2 - 1)
    nodes, weights = gauss_rule(np.zeros((1, 6)), betas[None])
    expected = np.polynomial.legendre.leggauss(6)
    np.testing.assert_allclose(nodes[0], expected[0], atol=1e-14)
    np.testing.assert_allclose(2 * weights[0], expected[1], atol=1e-14)


def test_three_vectors_are_kept_and_none_without_need() -> None:
    n, alive = 1000, []
    values = torch.linspace(0, 1, n, dtype=torch.float64)

    def product(v: torch.Tensor) -> torch.Tensor:
        import gc

        gc.collect()
        alive.append(
            sum(
                1
                for thing in gc.get_objects()
                if type(thing) is torch.Tensor
                and thing.numel() == n
                and thing is not values
                and thing.untyped_storage().nbytes() == 8 * n
                and thing._base is None
            )
        )
        return values * v

    density(CallableOperator(product, n), steps=4, draws=1)
    assert max(alive) <= 3


def test_deflated_eigenvalues_are_counted_exactly() -> None:
    values = SHAPES["few and zeros"]
    A = rotated(values)
    pairs = top_eigenpairs(A, 3)
    found = density(A, steps=10, draws=4, deflated=pairs)
    assert found.rest == N - 3
    count = found.count_above(0.5)
    assert (count.value, count.interval) == (pytest.approx(3), (3.0, 3.0))
    assert found.products == pairs.products + 4  # what is left is zero: one step each
    total = found.trace_of(lambda x: x)
    assert total.value == pytest.approx(7, abs=1e-6)


def test_curves_integrate_to_one_on_both_scales() -> None:
    found = density(rotated(SHAPES["indefinite"]), steps=20, draws=4)
    grid = np.linspace(-6, 8, 3000)
    assert np.trapezoid(found.evaluate(grid, 0.1), grid) == pytest.approx(1, abs=1e-6)
    decades = np.linspace(-8, 2, 3000)
    parts = [
        np.trapezoid(found.evaluate(s * 10**decades, 0.1, scale="log"), decades) for s in (1, -1)
    ]
    assert sum(parts) == pytest.approx(1, abs=1e-6)
    assert parts[1] == pytest.approx(found.mass(-10, 0).value, abs=1e-6)
    low, high = found.band(grid, 0.1)
    middle = found.evaluate(grid, 0.1)
    assert (low <= middle + 1e-12).mean() > 0.99
    assert (middle <= high + 1e-12).mean() > 0.99
    with pytest.raises(InputError, match="positive or all negative"):
        found.evaluate(np.array([-1.0, 1.0]), 0.1, scale="log")
    with pytest.raises(InputError, match="width"):
        found.evaluate(grid, 0.0)


def test_records_go_through_a_file(tmp_path: Path) -> None:
    A = rotated(SHAPES["indefinite"])
    found = density(A, steps=9, draws=2, deflated=top_eigenpairs(A, 2))
    path = write_arrays(tmp_path / "density.safetensors", found.to_arrays(), {})
    again = Density.from_arrays(read_arrays(path)[0])
    assert again.count_above(0.3) == found.count_above(0.3)
    assert (again.size, again.products, again.note) == (N, found.products, found.note)


class Killed(Exception):
    pass


def dying(A: torch.Tensor, after: int) -> CallableOperator:
    left = [after]

    def product(v: torch.Tensor) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return A @ v

    return CallableOperator(product, len(A))


@pytest.mark.parametrize("after", [5, 37, 43])
@pytest.mark.parametrize("deflated", [False, True])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, after: int, deflated: bool) -> None:
    A = rotated(SHAPES["indefinite"])
    pairs = top_eigenpairs(A, 2) if deflated else None
    options = {"steps": 30, "draws": 2, "seed": 5, "deflated": pairs}
    plain = density(CallableOperator(lambda v: A @ v, N), **options)
    with pytest.raises(Killed):
        density(dying(A, after), folder=tmp_path, **options)
    counted = dying(A, 1000)
    resumed = density(counted, folder=tmp_path, **options)
    np.testing.assert_array_equal(resumed.alphas, plain.alphas)
    np.testing.assert_array_equal(resumed.betas, plain.betas)
    assert resumed.products == plain.products
    saved = after // 30 * 30 + after % 30 // module.SAVE_EVERY * module.SAVE_EVERY
    checks = 1 if after >= 30 else 0  # one product tells whether it is the same operator
    assert counted.products == 60 - saved + checks
    assert not (tmp_path / "unfinished.safetensors").exists()


def test_a_folder_of_another_operator_seed_or_fact_is_refused(tmp_path: Path) -> None:
    A = rotated(SHAPES["indefinite"])
    density(A, steps=5, draws=2, folder=tmp_path, facts={"model": "a"})
    with pytest.raises(StateMismatch, match="model"):
        density(A, steps=5, draws=2, folder=tmp_path, facts={"model": "b"})
    with pytest.raises(StateMismatch, match="lanczos"):
        density(A, steps=5, draws=2, seed=1, folder=tmp_path, facts={"model": "a"})
    with pytest.raises(StateMismatch, match="another operator"):
        density(1.01 * A, steps=5, draws=2, folder=tmp_path, facts={"model": "a"})
    more = density(A, steps=5, draws=3, folder=tmp_path, facts={"model": "a"})
    np.testing.assert_array_equal(more.alphas, density(A, steps=5, draws=3).alphas)


def test_float32_products_give_float64_tridiagonals_and_nearly_the_same() -> None:
    A = rotated(SHAPES["falling"])
    single = density(MatrixOperator(A.float()), steps=10, draws=2)
    double = density(A, steps=10, draws=2)
    assert single.alphas.dtype == np.float64
    np.testing.assert_allclose(single.alphas[:, :3], double.alphas[:, :3], rtol=1e-5)


@pytest.mark.parametrize("name", ["steps", "draws", "batch"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        density(torch.eye(3), **{name: 0})  # type: ignore[arg-type]
