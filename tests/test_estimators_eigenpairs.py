from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from spectra import projector, rotated

from hawqkit.curvature.operator import MatrixOperator
from hawqkit.errors import InputError, NumericalError, StateMismatch
from hawqkit.estimators.eigenpair_files import read_eigenpairs, save_eigenpairs
from hawqkit.estimators.eigenpairs import Eigenpairs, top_eigenpairs
from hawqkit.estimators.power_iterations import power_iteration

INDEFINITE = np.concatenate([1 / np.arange(1.0, 190.0), -np.linspace(0.21, 0.71, 11)])


def true_residuals(A: torch.Tensor, pairs: Eigenpairs) -> np.ndarray:
    V = pairs.vectors.double()
    return (A.double() @ V - V * torch.from_numpy(pairs.values)).norm(dim=0).numpy()


@pytest.mark.parametrize(
    ("largest", "which"), [("magnitude", "LM"), ("algebraic", "LA"), ("smallest", "SA")]
)
@pytest.mark.parametrize("block", [1, 3])
def test_eigenvalues_equal_eigsh(largest: str, which: str, block: int) -> None:
    A = rotated(INDEFINITE)
    pairs = top_eigenpairs(A, 10, largest=largest, block=block)
    scipy = eigsh(
        LinearOperator(A.shape, matvec=A.numpy().__matmul__, dtype=float), 10, which=which
    )
    order = {"LM": -np.abs(scipy[0]), "LA": -scipy[0], "SA": scipy[0]}[which].argsort()
    np.testing.assert_allclose(pairs.values, scipy[0][order], rtol=0, atol=1e-6)
    overlaps = np.abs((pairs.vectors.numpy() * scipy[1][:, order]).sum(0))
    np.testing.assert_allclose(overlaps, 1, atol=1e-6)
    assert pairs.converged.all()


def test_both_ends_stand_in_falling_order() -> None:
    pairs = top_eigenpairs(rotated(INDEFINITE), 7, largest="both")
    values = np.sort(INDEFINITE)[::-1]
    np.testing.assert_allclose(pairs.values, [*values[:4], *values[-3:]], atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_residual_bounds_hold_and_vectors_are_orthonormal(seed: int, dtype: torch.dtype) -> None:
    A = rotated(INDEFINITE, seed).to(dtype)
    pairs = top_eigenpairs(A, 8, tolerance=1e-3, seed=seed)
    true = true_residuals(A, pairs)
    assert (true <= pairs.residuals).all()
    # The bound is the residual itself, not a loose one.
    assert true.max() > 0.5 * pairs.residuals.max()
    gram = pairs.vectors.T.double() @ pairs.vectors.double()
    assert float((gram - torch.eye(8)).abs().max()) < 50 * torch.finfo(dtype).eps
    eigenvalues = np.linalg.eigvalsh(A.double().numpy())
    distance = np.abs(pairs.values[:, None] - eigenvalues).min(1)
    assert (distance <= pairs.residuals).all()


@pytest.mark.parametrize("multiplicity", [2, 5])
@pytest.mark.parametrize("block", [1, 2])
def test_multiple_eigenvalues_appear_as_often_as_they_are(multiplicity: int, block: int) -> None:
    values = (
        [3.0] * multiplicity + [2.0] * multiplicity + [-1.5] * 2 + list(np.linspace(-1, 1, 150))
    )
    k = 2 * multiplicity + 2
    pairs = top_eigenpairs(rotated(values), k, block=block)
    np.testing.assert_allclose(pairs.values, values[:k], atol=1e-6)
    fewer = top_eigenpairs(rotated(values), multiplicity + 1, block=block)
    np.testing.assert_allclose(fewer.values, values[: multiplicity + 1], atol=1e-6)


def test_a_block_finds_multiplicities_without_further_runs() -> None:
    values = [3.0] * 4 + list(np.linspace(-1, 1, 150))
    pairs = top_eigenpairs(rotated(values), 4, block=4, deflate=False)
    np.testing.assert_allclose(pairs.values, 3, atol=1e-6)
    single = top_eigenpairs(rotated(values), 4, deflate=False, tolerance=1e-3)
    assert single.values[3] < 2  # one vector sees each eigenspace once


def test_a_projector_and_a_zero_operator_end_their_krylov_spaces_at_once() -> None:
    op = MatrixOperator(projector(60, 5))
    pairs = top_eigenpairs(op, 8)
    np.testing.assert_allclose(pairs.values, [1.0] * 5 + [0.0] * 3, atol=1e-12)
    assert pairs.products == op.products < 30
    zero = top_eigenpairs(torch.zeros(6, 6), 2)
    assert zero.values.tolist() == [0.0, 0.0]
    assert zero.converged.all()


def test_all_pairs_of_a_small_matrix() -> None:
    A = rotated(np.linspace(-2, 3, 12))
    pairs = top_eigenpairs(A, 12, largest="algebraic")
    np.testing.assert_allclose(pairs.values, np.linspace(3, -2, 12), atol=1e-12)
    assert pairs.products == 12


def test_more_pairs_than_dimensions_are_refused() -> None:
    with pytest.raises(InputError, match="n = 4 dimensions"):
        top_eigenpairs(torch.eye(4), 5)
    with pytest.raises(InputError, match="Did you mean 'magnitude'"):
        top_eigenpairs(torch.eye(4), 1, largest="magnitud")
    with pytest.raises(InputError, match="max_products"):
        top_eigenpairs(torch.eye(4), 3, max_products=2)


def test_thick_restart_keeps_the_memory_limit_and_finds_the_same() -> None:
    # Slowly falling, so that the small basis is restarted many times.
    values = np.linspace(1, 0, 300) ** 2
    A = rotated(values)
    limit = 24 * 300 * 8
    pairs = top_eigenpairs(A, 4, memory_bytes=limit, max_products=2000)
    np.testing.assert_allclose(pairs.values, values[:4], atol=1e-6)
    assert (true_residuals(A, pairs) <= pairs.residuals).all()
    assert pairs.converged.all()
    assert pairs.products > 24  # more than the basis ever held
    with pytest.raises(InputError, match="need 14"):
        top_eigenpairs(A, 4, memory_bytes=10 * 300 * 8)


def test_a_budget_that_is_too_small_is_kept_and_said() -> None:
    op = MatrixOperator(rotated(np.linspace(1, 0, 300)))
    pairs = top_eigenpairs(op, 4, max_products=12)
    assert op.products == pairs.products <= 12
    assert not pairs.converged.all()
    assert "have not converged" in pairs.note
    assert (true_residuals(op.dense(), pairs) <= pairs.residuals).all()


def test_a_nonsymmetric_operator_is_detected_on_request() -> None:
    generator = torch.Generator().manual_seed(0)
    skewed = rotated(np.linspace(1, 2, 30)) + 0.01 * torch.randn(
        30, 30, generator=generator, dtype=torch.float64
    )
    with pytest.raises(NumericalError, match="not symmetric"):
        MatrixOperator(skewed).check_symmetric()
    MatrixOperator(rotated(np.linspace(1, 2, 30))).check_symmetric()


def test_results_are_a_function_of_the_seed() -> None:
    A = rotated(INDEFINITE)
    one, two = (top_eigenpairs(A, 3, seed=4, tolerance=1e-3) for _ in "ab")
    assert torch.equal(one.vectors, two.vectors)
    assert not torch.equal(one.vectors, top_eigenpairs(A, 3, seed=5, tolerance=1e-3).vectors)


def test_power_iteration_agrees_and_needs_more_products() -> None:
    A = rotated(np.concatenate([[5.0, -4.0, 3.0], np.linspace(-1, 1, 60)]))
    plain = power_iteration(A, 3, tolerance=1e-6)
    pairs = top_eigenpairs(A, 3)
    np.testing.assert_allclose(plain.values, pairs.values, atol=1e-6)
    assert (true_residuals(A, plain) <= plain.residuals).all()
    assert plain.converged.all()
    assert plain.products > pairs.products
    tied = power_iteration(rotated([2.0, -2.0, 0.1, 0.0]), max_products=50)
    assert not tied.converged.any()


def test_half_precision_products_do_not_pass_as_converged() -> None:
    pairs = top_eigenpairs(rotated(INDEFINITE).bfloat16(), 2, tolerance=1e-6, max_products=60)
    assert pairs.vectors.dtype == torch.float32
    assert not pairs.converged.any()
    assert np.abs(pairs.values - [1.0, -0.71]).max() < 0.02


def blocked() -> MatrixOperator:
    blocks = {"layer.weight": slice(0, 12), "layer.bias": slice(12, 20)}
    return MatrixOperator(rotated(np.linspace(0, 1, 20)), blocks=blocks)


def test_vectors_come_as_named_tensors() -> None:
    pairs = top_eigenpairs(blocked(), 2)
    named = pairs.named(1, {"layer.weight": (3, 4)})
    assert named["layer.weight"].shape == (3, 4)
    joined = torch.cat([named["layer.weight"].flatten(), named["layer.bias"]])
    assert torch.equal(joined, pairs.vectors[:, 1])
    record = pairs.record()
    assert (record.size, len(record.values), record.products) == (20, 2, pairs.products)


def test_saved_pairs_are_read_back_and_damage_is_refused(tmp_path: Path) -> None:
    pairs = top_eigenpairs(blocked(), 3)
    path = save_eigenpairs(
        tmp_path / "deep" / "pairs.safetensors", pairs, shapes={"layer.weight": (3, 4)}
    )
    again, _ = read_eigenpairs(path)
    assert torch.equal(again.vectors, pairs.vectors)
    np.testing.assert_array_equal(again.values, pairs.values)
    assert (again.products, again.note, again.blocks) == (pairs.products, "", dict(pairs.blocks))
    from safetensors.torch import load_file

    assert load_file(path)["2/layer.weight"].shape == (3, 4)
    assert [p.name for p in path.parent.iterdir()] == ["pairs.safetensors"]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(StateMismatch, match="measure them again"):
        read_eigenpairs(path)
    with pytest.raises(InputError, match="they end at 12"):
        save_eigenpairs(path, pairs, {"layer.weight": slice(0, 12)})
    with pytest.raises(InputError, match="does not hold"):
        save_eigenpairs(path, pairs, shapes={"layer.bias": (3, 3)})
