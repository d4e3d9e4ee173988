from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spectra import projector, rotated

from hawqkit.curvature.operator import CallableOperator, MatrixOperator
from hawqkit.errors import InputError, StateMismatch
from hawqkit.estimators.effective_ranks import power_law, ranks_of, statistics_of
from hawqkit.estimators.noise import noise_floor
from hawqkit.estimators.ranks import deflated_density, dense_spectrum, rank, rank_statistics

STATISTICS = ("stable", "trace_ratio", "participation", "entropy")


@pytest.mark.parametrize(("n", "r"), [(30, 1), (30, 7), (30, 30), (200, 64)])
@pytest.mark.parametrize("dense", [True, False])
def test_every_rank_statistic_of_a_projector_is_its_rank(n: int, r: int, dense: bool) -> None:
    A = projector(n, r)
    spectrum = deflated_density(A, top=n if not dense else 0, dense_up_to=n if dense else 0)
    found = statistics_of(spectrum)
    for name in STATISTICS:
        assert getattr(found, name).value == pytest.approx(r, rel=1e-9), name
    ranks = ranks_of(spectrum, [0.5, 1e-6], noise_floor=1e-12)
    assert [c.value for c in ranks.counts] == [pytest.approx(r, abs=1e-9)] * 2
    assert all(c.interval == (r, r) for c in ranks.counts)
    assert ranks.degeneracy[0].value == pytest.approx(1 - r / n)
    assert [c.value for c in ranks.negative] == [0.0, 0.0]


def test_sampled_statistics_of_a_projector_hold_its_rank() -> None:
    spectrum = deflated_density(projector(200, 64), top=10, draws=20, dense_up_to=0)
    assert len(spectrum.known) == 10
    count = ranks_of(spectrum, 0.5, noise_floor=1e-12).counts[0]
    assert count.covers(64)
    assert count.stderr < 5
    found = statistics_of(spectrum)
    for name in STATISTICS:
        estimate = getattr(found, name)
        assert abs(estimate.value - 64) < 4 * estimate.stderr, name


def test_small_operators_are_counted_densely_with_no_error() -> None:
    values = np.concatenate([[3.0, -2.0, 1e-4, -1e-5], np.zeros(20)])
    op = MatrixOperator(rotated(values))
    ranks = rank(op, [1e-3, 3e-5, 1e-6])
    assert [c.value for c in ranks.counts] == [2, 3, 4]
    assert [c.value for c in ranks.negative] == [1, 1, 2]
    assert all(c.stderr == 0 and c.method == "dense" for c in ranks.counts)
    assert [d.value for d in ranks.degeneracy] == pytest.approx([1 - r / 24 for r in (2, 3, 4)])
    assert ranks.largest == pytest.approx(3)
    relative = rank(op, 0.5, relative=True)
    assert (relative.asked[0], relative.counts[0].value) == (pytest.approx(1.5), 2)


def large(seed: int = 0) -> tuple[CallableOperator, np.ndarray]:
    """Return an operator of 3,000 dimensions: a diagonal between two reflections."""
    n = 3000
    values = np.zeros(n)
    values[:12] = np.linspace(20, 8, 12)
    values[12:15] = -5.0
    values[15:600] = np.geomspace(1, 1e-4, 585)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, generator=generator, dtype=torch.float64)
    w /= w.norm()
    d = torch.from_numpy(values)

    def product(v: torch.Tensor) -> torch.Tensor:
        v = d * (v - 2 * w * (w @ v))
        return v - 2 * w * (w @ v)

    return CallableOperator(product, n), values


def test_large_operators_are_counted_by_pairs_and_quadrature() -> None:
    op, values = large()
    ranks = rank(op, [1e-2, 0.5, 2.0], draws=8, steps=40)
    truth = [int((np.abs(values) >= e).sum()) for e in (1e-2, 0.5, 2.0)]
    assert ranks.method == "lanczos quadrature"
    for count, r, degeneracy in zip(ranks.counts, truth, ranks.degeneracy, strict=True):
        assert count.covers(r)
        assert degeneracy.covers(1 - r / 3000)
    assert ranks.counts[2].interval == (15, 15)  # all of them found one by one
    assert ranks.negative[2].count == 3
    assert 0 < ranks.counts[0].stderr < 60
    found = rank_statistics(op, draws=8, steps=40)
    p = np.abs(values[values != 0]) / np.abs(values).sum()
    for name, expected in {
        "stable": (values**2).sum() / 400,
        "trace_ratio": values.sum() / 20,
        "participation": values.sum() ** 2 / (values**2).sum(),
        "entropy": np.exp(-(p * np.log(p)).sum()),
        "trace": values.sum(),
        "frobenius": np.sqrt((values**2).sum()),
    }.items():
        estimate = getattr(found, name)
        assert abs(estimate.value - expected) <= 4 * estimate.stderr + 1e-3 * abs(expected), name
    assert found.largest == pytest.approx(20, rel=1e-6)


def test_the_order_of_effective_ranks_holds_for_semidefinite_matrices() -> None:
    values = 1 / np.arange(1.0, 101.0)
    found = rank_statistics(rotated(values))
    shown = [getattr(found, name).value for name in STATISTICS]
    assert shown == sorted(shown)
    assert shown[0] == pytest.approx((values**2).sum())
    assert shown[2] == pytest.approx(values.sum() ** 2 / (values**2).sum())
    assert shown[3] < 100


def test_a_threshold_below_the_noise_floor_is_lifted_and_said() -> None:
    ranks = rank(rotated(np.linspace(0, 1, 50)).float(), [1e-12, 0.1])
    assert ranks.asked[0] == 1e-12
    assert ranks.eps[0] == ranks.noise_floor > 1e-9
    assert ranks.eps[1] == 0.1
    assert "1 of 2 thresholds were lifted" in ranks.note
    with pytest.raises(InputError, match="positive"):
        rank(torch.eye(3), [0.0])


def test_the_noise_floor_is_near_the_noise_that_products_have() -> None:
    A = rotated(np.linspace(0, 1, 200))
    assert 1e-17 < noise_floor(A) < 1e-13
    assert 1e-8 < noise_floor(A.float()) < 1e-5
    assert 1e-4 < noise_floor(A.bfloat16()) < 5e-2

    def noisy(v: torch.Tensor) -> torch.Tensor:
        # A fixed nonlinear error of relative size 1e-4.
        return A @ v + 1e-4 * v.norm() * torch.sin(1e6 * v) / 10

    assert 2e-5 < noise_floor(CallableOperator(noisy, 200)) < 1e-3
    assert noise_floor(torch.zeros(5, 5)) == 0


def test_a_zero_operator_has_rank_zero() -> None:
    ranks = rank(torch.zeros(6, 6), [1e-6], relative=True)
    assert ranks.counts[0].value == 0
    assert ranks.degeneracy[0].value == 1
    found = rank_statistics(torch.zeros(6, 6))
    assert [getattr(found, name).value for name in STATISTICS] == [0, 0, 0, 0]
    assert "zero" in found.note
    spectrum = deflated_density(torch.zeros(6, 6), top=2, dense_up_to=0)
    assert ranks_of(spectrum, 1e-6, noise_floor=0.0).counts[0].interval == (0, 0)


def test_dense_spectra_are_numpys() -> None:
    A = rotated(np.linspace(-1, 3, 25))
    np.testing.assert_allclose(dense_spectrum(A).known, np.linalg.eigvalsh(A.numpy())[::-1])


def test_kept_pairs_and_draws_are_reused_and_checked(tmp_path: Path) -> None:
    op, _ = large()
    first = rank(op, 0.5, draws=2, steps=10, folder=tmp_path, facts={"model": "a"})
    again, _ = large()
    second = rank(again, 0.5, draws=2, steps=10, folder=tmp_path, facts={"model": "a"})
    assert second == first
    assert again.products < 20  # the noise floor and the two checks
    other, _ = large(seed=1)
    with pytest.raises(StateMismatch, match="another operator"):
        rank(other, 0.5, draws=2, steps=10, folder=tmp_path, facts={"model": "a"})
    with pytest.raises(StateMismatch, match="other settings"):
        rank(op, 0.5, draws=2, steps=10, folder=tmp_path, facts={"model": "b"})


@pytest.mark.parametrize("s", [0.7, 1.5])
def test_power_laws_are_found_and_accepted(s: float) -> None:
    law = power_law(3 * np.arange(1.0, 1001.0) ** -s)
    assert law.exponent == pytest.approx(s, rel=0.01)
    assert law.accepted
    assert law.threshold == pytest.approx(1.36 / np.sqrt(1000))
    generator = np.random.default_rng(0)
    sampled = power_law(generator.uniform(size=1000) ** -s)
    assert abs(sampled.exponent - s) < 4 * sampled.stderr
    assert sampled.accepted


def test_other_laws_are_refused() -> None:
    assert not power_law(np.exp(-np.arange(1000) / 100)).accepted
    assert not power_law(np.linspace(1, 2, 1000)).accepted


def test_power_law_takes_the_largest_positive_ones() -> None:
    values = np.concatenate([np.arange(1.0, 201.0) ** -1.0, -np.ones(50), np.zeros(9)])
    law = power_law(values, K=50)
    assert (law.K, law.smallest) == (50, 1 / 50)
    assert law == power_law(values[:50])
    for bad, words in (
        (np.ones(20), "equal"),
        (np.ones(3), "3 positive"),
        (-np.ones(20), "0 positive"),
    ):
        with pytest.raises(InputError, match=words):
            power_law(bad)
    with pytest.raises(InputError, match="give 10 to 200"):
        power_law(values, K=201)
