"""Eigenvalues apart from the bulk, beside the number of classes."""

from __future__ import annotations

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from curvature_oracles import Case
from torch import nn

from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import cross_entropy
from hawqkit.errors import InputError
from hawqkit.estimators.eigenpairs import top_eigenpairs
from hawqkit.estimators.ranks import deflated_density, dense_spectrum
from hawqkit.spectrum.class_structure import class_decomposition
from hawqkit.spectrum.outliers import outliers


def clustered(C: int, *, width: float = 0.1) -> Case:
    """Train an MLP on C tight clusters around orthogonal means, with weight decay.

    The decay keeps the classes' probabilities alike, as the closed form of softmax regression has
    them: its C eigenvalues of the classes are C (1 - a) times those between classes.
    """
    y = torch.arange(8 * C) % C
    x = 3 * torch.eye(C, dtype=torch.float64)[y] + width * oracles.noise(8 * C, C, seed=21)
    model = nn.Sequential(nn.Linear(C, 12), nn.Tanh(), nn.Linear(12, C)).double()
    oracles.filled(model, scale=0.3)
    for _ in range(600):
        loss = nn.functional.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.5 * (gradient + 0.01 * parameter)
    return Case(
        model, [(x[:9], y[:9]), (x[9:], y[9:])], lambda m: m(x), y, oracles.all_names(model)
    )


def eigenvalues(A: torch.Tensor) -> np.ndarray:
    return np.linalg.eigvalsh(A.detach().numpy())[::-1]


@pytest.mark.parametrize("C", [3, 4, 5])
def test_g_of_tight_clusters_has_one_outlier_for_each_pair_of_classes(C: int) -> None:
    """C points with C - 1 free logits each: C (C - 1) eigenvalues, then a bulk from the width."""
    case = clustered(C)
    truth = eigenvalues(oracles.dense_gauss_newton(case))
    G = gauss_newton(case.model, cross_entropy(), case.batches)
    found = outliers(top_eigenpairs(G, C * (C - 1) + 2, largest="algebraic"), C)
    assert found.count == C * (C - 1)
    assert found.matches == ("C (C - 1)",)
    assert found.ratio == pytest.approx(truth[found.count - 1] / truth[found.count], rel=1e-3)
    assert found.ratio > 10


@pytest.mark.parametrize("C", [4, 5])
def test_the_hessian_has_as_many_outliers_as_classes_and_they_are_the_class_part(C: int) -> None:
    case = clustered(C)
    truth = eigenvalues(oracles.dense_hessian(case))
    H = hessian(case.model, cross_entropy(), case.batches)
    for spectrum in (
        dense_spectrum(H),
        truth,
        torch.tensor(truth.copy()),
        top_eigenpairs(H, 2 * C),
    ):
        found = outliers(spectrum, C)
        assert found.count == C
        assert found.matches == ("C",)
        assert found.edge == pytest.approx(truth[C], rel=1e-5)
        assert found.ratio == pytest.approx(truth[C - 1] / truth[C], rel=1e-4)
        assert found.gap(C) == found.ratio
    parts = class_decomposition(case.model, cross_entropy(), case.batches)
    top = top_eigenpairs(H, C).vectors
    means = torch.linalg.qr(parts.class_part.dense() @ top)[0]  # the span of the class means
    overlap = float((means.T @ top).square().sum()) / C
    assert overlap > 0.9
    assert parts.class_values[-1] > 2 * parts.cross_values[0]


def test_deflated_eigenvalues_of_a_larger_operator_serve_as_well() -> None:
    generator = torch.Generator().manual_seed(3)
    values = torch.cat([torch.tensor([9.0, 8.0, 7.0]), torch.rand(117, generator=generator)])
    Q = torch.linalg.qr(oracles.noise(120, 120, seed=4))[0]
    A = Q @ torch.diag(values.double()) @ Q.T
    density = deflated_density(A, top=6, steps=20, draws=2, dense_up_to=50)
    assert density.draws == 2
    found = outliers(density, 3)
    assert (found.count, found.matches) == (3, ("C",))
    assert len(found.gaps) == 5


def test_residuals_count_against_a_gap() -> None:
    pairs = top_eigenpairs(torch.diag(torch.tensor([6.0, 5.0, 1.0, 0.5])).double(), 4).record()
    found = outliers(pairs, 2)
    assert (found.count, found.matches) == (2, ("C", "C (C - 1)"))
    unsure = type(pairs)(**{**_fields(pairs), "residuals": (0.0, 3.0, 0.6, 0.0)})
    vague = outliers(unsure, 2, separation=1.3)
    assert vague.gap(2) == pytest.approx((5 - 3) / (1 + 0.6))
    assert vague.count == 0


def _fields(record: object) -> dict[str, object]:
    return {name: getattr(record, name) for name in record.__slots__}  # type: ignore[attr-defined]


def test_a_bulk_alone_has_no_outliers_and_a_large_negative_end_belongs_to_it() -> None:
    found = outliers(np.linspace(1.0, 0.1, 50), 3)
    assert found.count == 0
    assert found.matches == ()
    assert "no gap has a ratio of 1.5" in found.note
    assert found.edge == 1.0
    # 3 and 2.9 stand apart from 1, but not from -2.8.
    assert outliers([3.0, 2.9, 1.0, 0.9, 0.8, -2.8], 2).count == 0
    assert outliers([3.0, 2.9, 1.0, 0.9, 0.8, -0.1], 2).count == 2


def test_what_is_zero_to_rounding_is_no_outlier() -> None:
    found = outliers([2.0, 1.9, 1e-17, 1e-20, 0.0, -1e-18], 3)
    assert found.count == 2
    assert found.matches == ("C - 1",)
    assert outliers([0.0, 0.0, 0.0], 2).count == 0


def test_the_lower_half_of_both_ends_is_not_taken_for_what_follows_the_upper() -> None:
    A = torch.diag(torch.tensor([9.0, 8.0, 7.0, 6.5, 6.0, 5.5, 0.3, 0.2, 0.1, 0.05])).double()
    both = top_eigenpairs(A, 6, largest="both")  # 9, 8, 7 and 0.2, 0.1, 0.05
    found = outliers(both, 2)
    assert found.values == pytest.approx((9.0, 8.0, 7.0))
    with pytest.raises(InputError, match="0 eigenvalues that are known one by one from the top"):
        outliers(top_eigenpairs(A, 3, largest="smallest"), 2)


def test_too_little_and_wrong_input_is_refused_or_said() -> None:
    with pytest.raises(InputError, match="one more than the outliers"):
        outliers([1.0], 3)
    with pytest.raises(InputError, match="classes: must be 2"):
        outliers([1.0, 0.5], 1)
    with pytest.raises(InputError, match="NaN"):
        outliers([1.0, float("nan")], 2)
    with pytest.raises(InputError, match="most: must be 1"):
        outliers([1.0, 0.5], 2, most=0)
    with pytest.raises(InputError, match="separation"):
        outliers([1.0, 0.5], 2, separation=0.5)
    assert "only the gaps after 1 to 1 are known" in outliers([3.0, 1.0], 10).note
    assert outliers([9.0, 3.0, 1.0, 0.1], 4, most=2).count == 1
    assert outliers([9.0, 3.0], 2).gap(7) is None
