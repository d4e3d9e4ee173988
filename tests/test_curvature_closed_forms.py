"""Linear, logistic and softmax regression: Hessians that can be written down."""

from __future__ import annotations

import curvature_oracles as oracles
import pytest
import torch
from curvature_oracles import relative
from torch import Tensor, nn

from hawqkit.curvature.fisher import empirical_fisher, fisher
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import Objective, cross_entropy, squared_error

ROUNDING = 1e-12


def data() -> Tensor:
    return oracles.noise(13, 4, seed=1)


def in_batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(x[:6], y[:6]), (x[6:11], y[6:11]), (x[11:], y[11:])]


def regression(outputs: int) -> nn.Linear:
    layer = nn.Linear(4, outputs, bias=False).double()
    return oracles.filled(layer, seed=2)


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_linear_regression_is_the_second_moment(products: str) -> None:
    x, y = data(), oracles.noise(13, 3, seed=3)
    truth = torch.kron(torch.eye(3, dtype=x.dtype), x.T @ x / 13)  # x x' for each output
    for make in (hessian, gauss_newton):
        op = make(regression(3), squared_error(), in_batches(x, y), products=products)
        assert relative(op.dense(), truth) <= ROUNDING


def test_linear_regression_with_one_number_an_example() -> None:
    x, y = data(), oracles.noise(13, seed=3)
    model = nn.Sequential(regression(1), nn.Flatten(0))
    op = hessian(model.eval(), squared_error(), in_batches(x, y))
    assert relative(op.dense(), x.T @ x / 13) <= ROUNDING
    E = empirical_fisher(model, squared_error(), in_batches(x, y)).dense()
    r = (model(x) - y).detach()
    assert relative(E, (x * r[:, None] ** 2).T @ x / 13) <= ROUNDING


def test_logistic_regression() -> None:
    x, y = data(), (torch.arange(13) % 2).double()
    model = regression(1)
    logistic = Objective(
        outputs=lambda model, batch: model(batch[0])[:, 0],
        loss=lambda z, batch: (
            nn.functional.binary_cross_entropy_with_logits(z, batch[1], reduction="sum"),
            len(z),
        ),
    )
    p = torch.sigmoid(x @ model.weight[0]).detach()
    truth = (x * (p * (1 - p))[:, None]).T @ x / 13
    for make in (hessian, gauss_newton):
        for products in ("autograd", "forward"):
            op = make(model, logistic, in_batches(x, y), products=products)
            assert relative(op.dense(), truth) <= ROUNDING


@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_softmax_regression(products: str) -> None:
    x, y = data(), torch.arange(13) % 3
    model = regression(3)
    p = torch.softmax(x @ model.weight.T, -1).detach()
    L = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # (n, 3, 3)
    truth = torch.einsum("ncd,ni,nj->cidj", L, x, x).reshape(12, 12) / 13
    for make in (hessian, gauss_newton):
        op = make(model, cross_entropy(), in_batches(x, y), products=products)
        assert relative(op.dense(), truth) <= ROUNDING


def test_ignored_labels_leave_their_examples_out() -> None:
    x, y = data(), torch.arange(13) % 3
    ignored = y.clone()
    ignored[[0, 7, 11, 12]] = -100  # the last batch counts nothing
    kept = ignored != -100
    model = regression(3)
    for make in (hessian, gauss_newton, empirical_fisher):
        op = make(model, cross_entropy(), in_batches(x, ignored))
        alone = make(model, cross_entropy(), [(x[kept], y[kept])])
        assert relative(op.dense(), alone.dense()) <= ROUNDING


def test_sampled_labels_do_not_depend_on_the_batching() -> None:
    x, y = data(), torch.arange(13) % 3
    parts = fisher(regression(3), cross_entropy(), in_batches(x, y), seed=4).dense()
    whole = fisher(regression(3), cross_entropy(), [(x, y)], seed=4).dense()
    other = fisher(regression(3), cross_entropy(), [(x, y)], seed=5).dense()
    assert relative(parts, whole) <= ROUNDING
    assert relative(other, whole) > 0.01


def test_classes_may_be_the_second_axis_as_in_torch() -> None:
    x = oracles.noise(4, 3, 5, seed=6)  # (B, channels, positions)
    y = torch.arange(20).reshape(4, 5) % 2
    model = oracles.filled(nn.Conv1d(3, 2, 1, bias=False).double())
    op = hessian(model, cross_entropy(), [(x[:3], y[:3]), (x[3:], y[3:])])
    flat = x.movedim(1, -1).reshape(-1, 3)
    linear = nn.Linear(3, 2, bias=False).double().eval()
    linear.weight.data.copy_(model.weight.detach()[:, :, 0])
    alone = hessian(linear, cross_entropy(), [(flat, y.flatten())])
    assert relative(op.dense(), alone.dense()) <= ROUNDING
