"""The parts of G by classes against Jacobians, and against closed forms; outliers by classes."""

from __future__ import annotations

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from curvature_oracles import Case, relative
from torch import Tensor, nn

from hawqkit.curvature.objective import Objective, cross_entropy, squared_error
from hawqkit.errors import DataError, Unsupported
from hawqkit.spectrum.class_structure import ClassDecomposition, class_decomposition

# Of what is zero in exact arithmetic, over the largest eigenvalue.
ROUNDING = 1e-10


def dense_parts(case: Case) -> dict[str, Tensor]:
    """Return Papyan's parts by loops over predictions and classes, from the Jacobian."""
    z, J = oracles.jacobian(case)
    p, N, C = torch.softmax(z, -1), len(z), z.shape[1]
    n = J.shape[2]
    g = [[J[i].T @ (p[i] - torch.eye(C, dtype=p.dtype)[c]) for c in range(C)] for i in range(N)]
    parts = {
        name: torch.zeros(n, n, dtype=p.dtype) for name in ("class", "cross", "within", "same")
    }
    for c in range(C):
        rows = [i for i in range(N) if int(case.targets[i]) == c]
        for i in rows:
            parts["same"] += p[i, c] / N * torch.outer(g[i][c], g[i][c])
        means, weights = [], []
        for other in (k for k in range(C) if k != c):
            w = sum(p[i, other] for i in rows) / N
            mean = sum(p[i, other] / N * g[i][other] for i in rows) / w
            means.append(mean)
            weights.append(w)
            for i in rows:
                d = g[i][other] - mean
                parts["within"] += p[i, other] / N * torch.outer(d, d)
        middle = sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights)
        parts["class"] += sum(weights) * torch.outer(middle, middle)
        for w, mean in zip(weights, means, strict=True):
            parts["cross"] += w * torch.outer(mean - middle, mean - middle)
    return {name: part.detach() for name, part in parts.items()}


def decomposed(case: Case, products: str = "auto") -> ClassDecomposition:
    return class_decomposition(
        case.model, cross_entropy(), case.batches, parameters=list(case.names), products=products
    )


def token_classifier() -> Case:
    """Return predictions at positions, some without a label, with the classes second."""
    x = oracles.noise(5, 3, 4, seed=6)  # (B, channels, positions)
    y = torch.arange(20).reshape(5, 4) % 3
    y[0, 1], y[3] = -100, -100
    model = oracles.filled(
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.Tanh(), nn.Conv1d(4, 3, 1)).double()
    )
    counted = y.flatten() != -100

    def predict(m: nn.Module) -> Tensor:
        return m(x).movedim(1, -1).reshape(20, 3)[counted]

    batches = [(x[:3], y[:3]), (x[3:4], y[3:4]), (x[4:], y[4:])]
    return Case(model, batches, predict, y.flatten()[counted], oracles.all_names(model))


CASES = {"mlp": oracles.mlp, "cnn with batch norm": oracles.cnn, "positions": token_classifier}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_each_part_is_that_of_the_jacobian_and_they_add_up_to_g(name: str, products: str) -> None:
    case = CASES[name]()
    found, truth = decomposed(case, products), dense_parts(case)
    G = oracles.dense_gauss_newton(case)
    scale = G.norm()
    for part, operator in found.parts().items():
        assert float((operator.dense() - truth[part]).norm() / scale) <= ROUNDING, part
        assert float(truth[part].norm() / scale) > 1e-4, part  # none is zero
    assert relative(sum(operator.dense() for operator in found.parts().values()), G) <= ROUNDING
    assert relative(found.whole.dense(), G) <= ROUNDING


def test_ranks_are_at_most_those_of_papyan_and_values_those_of_the_parts() -> None:
    case = oracles.mlp()  # 4 classes, 11 examples
    found, C = decomposed(case), 4
    for operator, values, most in (
        (found.class_part, found.class_values, C),
        (found.cross_part, found.cross_values, C * (C - 2)),
    ):
        dense = np.linalg.eigvalsh(operator.dense().numpy())[::-1]
        np.testing.assert_allclose(values, dense[: len(values)], atol=1e-14 * dense[0] * 100)
        assert int((dense > ROUNDING * dense[0]).sum()) == most
    assert found.classes == C
    assert found.examples == (3, 3, 3, 2)
    # Three batches, the last of which has two of the classes (2 and 1 of 11 % 4).
    assert found.backward_passes == (4 + 4 + 2) * (C - 1)


def test_batches_and_order_change_nothing() -> None:
    case = oracles.mlp()
    x, y = (torch.cat(column) for column in zip(*case.batches, strict=True))
    turned = [(x.flip(0), y.flip(0))]
    whole = class_decomposition(case.model, cross_entropy(), turned)
    parts = decomposed(case)
    np.testing.assert_allclose(whole.class_values, parts.class_values, rtol=1e-12)
    assert relative(whole.within_part.dense(), parts.within_part.dense()) <= ROUNDING


def test_a_class_without_examples_has_no_part_and_blocks_are_submatrices() -> None:
    case = oracles.mlp()
    kept = [(x[y != 2], y[y != 2]) for x, y in case.batches]
    found = class_decomposition(case.model, cross_entropy(), kept, parameters=["2"])
    assert found.examples[2] == 0
    assert float(found.weights[2].sum()) == 0
    assert int((found.class_values > 1e-12 * found.class_values[0]).sum()) == 3
    total = sum(part.dense() for part in found.parts().values())
    assert relative(total, found.whole.dense()) <= ROUNDING
    name = "2.bias"
    inside = sum(part.block(name).dense() for part in found.parts().values())
    assert (
        relative(inside, total[found.whole.blocks[name]][:, found.whole.blocks[name]]) <= ROUNDING
    )


def test_a_loss_without_hard_labels_and_data_without_labels_are_refused() -> None:
    case = oracles.mlp()
    smoothed = Objective(
        outputs=lambda model, batch: model(batch[0]),
        loss=lambda z, batch: (
            nn.functional.cross_entropy(z, batch[1], reduction="sum", label_smoothing=0.2),
            len(z),
        ),
    )
    with pytest.raises(Unsupported, match="smoothed labels"):
        class_decomposition(case.model, smoothed, case.batches)
    numbers = oracles.mlp(loss="squared")
    with pytest.raises(Unsupported, match="no softmax cross-entropy"):
        class_decomposition(numbers.model, squared_error(), numbers.batches)
    ignored = [(x, torch.full_like(y, -100)) for x, y in case.batches]
    with pytest.raises(DataError, match="no prediction counts"):
        class_decomposition(case.model, cross_entropy(), ignored)
    with pytest.raises(Unsupported, match="12 cross-class means"):
        class_decomposition(case.model, cross_entropy(), case.batches, memory_bytes=1000)


class GivenProbabilities(nn.Module):
    """Softmax regression with weights zero, beside log-probabilities that come with the input."""

    def __init__(self, D: int, C: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, D, dtype=torch.float64))

    def forward(self, x: Tensor, logarithms: Tensor) -> Tensor:
        return logarithms + x @ self.weight.T


@pytest.mark.parametrize(
    ("C", "D", "t", "a"), [(3, 5, 2.0, 0.3), (5, 7, 4.0, 0.1), (4, 4, 1.0, 0.6)]
)
def test_softmax_regression_with_exact_moments_has_its_closed_form(
    C: int, D: int, t: float, a: float
) -> None:
    """x = t e_c + noise whose first and second moments are exactly those of N(0, I)."""
    steps = D**0.5 * torch.cat([torch.eye(D), -torch.eye(D)]).double()  # mean 0, covariance I
    s, b = t**2, a / (C - 1)
    batches = []
    for c in range(C):
        x = steps + t * torch.eye(D, dtype=torch.float64)[c]
        p = torch.full((2 * D, C), b, dtype=torch.float64)
        p[:, c] = 1 - a
        batches.append(((x, p.log()), torch.full((2 * D,), c)))
    found = class_decomposition(GivenProbabilities(D, C).eval(), cross_entropy(), batches)
    flat = b * (2 - a * C / (C - 1))
    expected = sorted(
        [b * s * (1 - a) + flat] * C
        + [b * s / C + flat] * (C * (C - 2))
        + [flat] * ((D - C) * (C - 1))
        + [0.0] * D,
        reverse=True,
    )
    total = sum(part.dense() for part in found.parts().values())
    for G in (found.whole.dense(), total):
        values = np.linalg.eigvalsh(G.numpy())[::-1]
        np.testing.assert_allclose(values, expected, atol=1e-10, rtol=0)
    # The means of x are t e_c: the class and cross-class parts hold what belongs to s alone.
    length = (1 - a) ** 2 * (1 + 1 / (C - 1))  # |p - mean of the other e_c'|^2, which is g_c by t
    np.testing.assert_allclose(found.class_values, np.full(C, a * s * length / C), atol=1e-10)
    cross = np.repeat([b * s / C, 0.0], [C * (C - 2), C])
    np.testing.assert_allclose(found.cross_values, cross, atol=1e-10)
