"""Ranks of deep linear networks: formulas against what is counted, in depth and in rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from curvature_oracles import Case, all_names, dense_gauss_newton, dense_hessian, relative
from torch import Tensor, nn

from hawqkit.curvature.objective import Objective, cross_entropy, squared_error
from hawqkit.errors import InputError, Unsupported
from hawqkit.spectrum.deep_linear import (
    DeepLinearRanks,
    MeasuredRanks,
    deep_linear_ranks,
    measure_deep_linear_ranks,
)

DRAWS = 30
# Counts are at 1e-11; what is zero in exact arithmetic lies a hundred times below.
DROPPED = 1e-13


class Draws:
    """Numbers of one test case from its own seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def between(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def low_rank(self, rows: int, columns: int, rank: int) -> Tensor:
        return self.normal(rows, rank) @ self.normal(rank, columns)


@dataclass
class Drawn:
    """A network and data, and the ranks that were put in."""

    model: nn.Sequential
    x: Tensor
    targets: Tensor
    widths: list[int]
    r: int
    s: int
    loss: str
    q: int | None = None

    @property
    def outputs(self) -> int:
        return self.widths[-1] - (self.loss == "cross-entropy")

    def measured(self) -> MeasuredRanks:
        batches = [(self.x[:25], self.targets[:25]), (self.x[25:], self.targets[25:])]
        objective = squared_error() if self.loss == "squared" else soft_cross_entropy()
        at_minimum = self.q is not None
        return measure_deep_linear_ranks(
            self.model, objective, batches, loss=self.loss, at_minimum=at_minimum
        )


def soft_cross_entropy() -> Objective:
    """Return cross-entropy with targets that are distributions, so that residuals can be chosen."""

    def loss(z: Tensor, batch: Any) -> tuple[Tensor, int]:
        return -(batch[1] * torch.log_softmax(z, -1)).sum(), len(z)

    return Objective(lambda model, batch: model(batch[0]), loss)


def network(widths: list[int], weights: list[Tensor]) -> nn.Sequential:
    layers = [nn.Linear(a, b, bias=False).double() for a, b in pairwise(widths)]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data.copy_(weight)
    return nn.Sequential(*layers).eval()


def anywhere(seed: int, loss: str) -> Drawn:
    """Draw depth, widths, weights, and inputs and residual of whatever rank they may have."""
    draw = Draws(seed)
    widths = [draw.between(2, 9) for _ in range(draw.between(3, 5))]
    outputs = widths[-1] - (loss == "cross-entropy")
    r = draw.between(1, widths[0])
    s = draw.between(0, min(r, outputs))
    weights = [draw.normal(b, a) / a**0.5 for a, b in pairwise(widths)]
    x = draw.low_rank(60, widths[0], r)
    model = network(widths, weights)
    with torch.no_grad():
        z = model(x)
    residual = x @ draw.low_rank(widths[-1], widths[0], s).T
    if loss == "cross-entropy":
        residual = residual - residual.mean(1, keepdim=True)  # probabilities add up to one
        z = torch.softmax(z, -1)
    return Drawn(model, x, z - residual, widths, r, s, loss)


def fitted(seed: int, loss: str) -> Drawn:
    """Draw a network at a minimum with residual zero, of any rank that its widths allow."""
    draw = Draws(seed)
    widths = [draw.between(2, 9) for _ in range(draw.between(3, 5))]
    outputs = widths[-1] - (loss == "cross-entropy")
    r = draw.between(1, widths[0])
    q = draw.between(1, min(r, outputs, *widths[1:-1]))
    x = draw.low_rank(60, widths[0], r)
    W = draw.low_rank(widths[-1], widths[0], q)
    W = W - W.mean(0) if loss == "cross-entropy" else W
    model = network(widths, transformed(draw, balanced(draw, W, widths, q)))
    with torch.no_grad():
        z = model(x)
    targets = z if loss == "squared" else torch.softmax(z, -1)
    return Drawn(model, x, targets, widths, r, 0, loss, q)


def constrained(seed: int) -> Drawn:
    """Draw a global minimum that the hidden widths keep from fitting: Eckart and Young's."""
    draw = Draws(seed)
    widths = [draw.between(2, 9) for _ in range(draw.between(3, 5))]
    r = draw.between(1, widths[0])
    q = min(r, *widths[1:])
    x = draw.low_rank(60, widths[0], r)
    fit = x @ draw.normal(widths[-1], widths[0]).T
    noise = draw.normal(60, widths[-1])
    inverse = torch.linalg.pinv(x)
    U, S, V = torch.linalg.svd(fit, full_matrices=False)
    W = (inverse @ (U[:, :q] * S[:q]) @ V[:q]).T
    model = network(widths, transformed(draw, balanced(draw, W, widths, q)))
    targets = fit + noise - x @ (inverse @ noise)  # what inputs cannot explain changes nothing
    return Drawn(model, x, targets, widths, r, min(r, widths[-1]) - q, "squared", q)


def balanced(draw: Draws, W: Tensor, widths: list[int], q: int) -> list[Tensor]:
    """Return weights whose product is W, each of rank q with the roots of its singular values."""
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    roots = torch.diag(S[:q] ** (1 / (len(widths) - 1)))
    turns = [torch.linalg.qr(draw.normal(m, m))[0][:, :q] for m in widths[1:-1]]
    lefts, rights = [*turns, U[:, :q]], [V[:q].T, *turns]
    return [left @ roots @ right.T for left, right in zip(lefts, rights, strict=True)]


def transformed(draw: Draws, weights: list[Tensor]) -> list[Tensor]:
    """Return other weights with the same product, no longer balanced."""
    weights = list(weights)
    for i in range(len(weights) - 1):
        m = len(weights[i])
        A = torch.linalg.qr(draw.normal(m, m))[0] * (0.5 + draw.normal(m) ** 2)
        weights[i], weights[i + 1] = A @ weights[i], weights[i + 1] @ torch.linalg.inv(A)
    return weights


def assert_exact(drawn: Drawn) -> None:
    found = drawn.measured()
    formula = found.formula
    assert (formula.input_rank, formula.residual_rank) == (drawn.r, drawn.s), drawn.widths
    assert found.agree, (drawn.widths, found)
    assert found.note == ""
    assert found.largest_dropped < DROPPED


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_counted_ranks_are_those_of_the_formulas_in_all_draws(loss: str) -> None:
    for seed in range(DRAWS):
        assert_exact(anywhere(seed, loss))


@pytest.mark.parametrize("loss", ["squared", "cross-entropy"])
def test_at_a_minimum_they_are_those_of_the_end_to_end_matrix(loss: str) -> None:
    for seed in range(DRAWS):
        drawn = fitted(seed, loss)
        assert drawn.measured().formula.q == drawn.q
        assert_exact(drawn)


def test_at_a_minimum_that_the_widths_keep_from_fitting_too() -> None:
    drawn = [constrained(seed) for seed in range(DRAWS)]
    assert sum(d.s > 0 for d in drawn) >= 10  # draws where a residual is left
    for each in drawn:
        assert each.measured().formula.q == each.q
        assert_exact(each)


def test_draws_reach_every_kind_of_bottleneck() -> None:
    drawn = [anywhere(seed, "squared") for seed in range(DRAWS)]
    ends = [min(d.r, d.outputs) - min(d.widths[1:-1]) for d in drawn]
    assert min(ends) < 0 < max(ends)
    limits = [d.s - min(d.r, d.outputs, *d.widths[1:-1]) for d in drawn]
    assert min(limits) < 0 < max(limits)
    assert any(d.r < d.widths[0] for d in drawn)
    assert {len(d.widths) for d in drawn} == {3, 4, 5}


def test_the_paper_s_example_is_counted_too() -> None:
    found = deep_linear_ranks([25, 5, 10, 10])
    assert (found.gauss_newton, found.functional, found.hessian) == (150, 175, 250)
    assert found.size == 275
    assert found.degeneracy == pytest.approx(25 / 275)
    draw = Draws(5)
    widths = [25, 5, 10, 10]
    weights = [draw.normal(b, a) / a**0.5 for a, b in pairwise(widths)]
    x, y = draw.normal(60, 25), draw.normal(60, 10)
    measured = measure_deep_linear_ranks(network(widths, weights), squared_error(), [(x, y)])
    assert measured.formula == found
    assert measured.agree


def test_counts_are_those_of_matrices_made_without_the_operators() -> None:
    draw = Draws(8)
    widths = [6, 3, 5, 4]
    weights = [draw.normal(b, a) for a, b in pairwise(widths)]
    model = network(widths, weights)
    x, y = draw.normal(40, 6), torch.arange(40) % 4
    case = Case(model, [(x, y)], lambda m: m(x), y, all_names(model))
    G, H = dense_gauss_newton(case).detach(), dense_hessian(case)
    assert relative(G, H) > 0.01
    values = [np.abs(np.linalg.eigvalsh(A.numpy())) for A in (G, H - G, H)]
    counts = tuple(int((v > 1e-11 * values[2].max()).sum()) for v in values)
    found = measure_deep_linear_ranks(model, cross_entropy(), case.batches)
    assert counts == (found.gauss_newton, found.functional, found.hessian)
    assert counts == (3 * (6 + 3 - 3), 2 * 3 * 8 + 2 * 3 * 3 - 3 * 9, 3 * 6 + 2 * 3 * 8 - 2 * 9)


def test_ignored_labels_have_no_part_in_the_ranks() -> None:
    draw = Draws(9)
    model = network([5, 4, 3], [draw.normal(4, 5), draw.normal(3, 4)])
    x, y = draw.normal(20, 5), torch.arange(20) % 3
    y[2:] = -100  # two inputs are left
    found = measure_deep_linear_ranks(model, cross_entropy(), [(x, y)])
    assert found.formula.input_rank == 2
    assert found.agree


def test_one_layer_has_no_functional_part() -> None:
    found = deep_linear_ranks([6, 4], input_rank=5)
    assert (found.gauss_newton, found.functional, found.hessian) == (20, 0, 20)
    draw = Draws(4)
    model = network([6, 4], [draw.normal(4, 6)])
    x, y = draw.low_rank(30, 6, 5), torch.arange(30) % 4
    measured = measure_deep_linear_ranks(model, cross_entropy(), [(x, y)])
    assert (measured.gauss_newton, measured.functional, measured.hessian) == (15, 0, 15)
    assert measured.agree


def test_weights_that_the_formulas_are_not_for_are_named() -> None:
    draw = Draws(6)
    low = network([6, 5, 4], [draw.normal(5, 6), draw.low_rank(4, 5, 2)])
    x, y = draw.normal(30, 6), draw.normal(30, 4)
    found = measure_deep_linear_ranks(low, squared_error(), [(x, y)])
    # Of the 4 outputs 2 change with W_1, and all 4 with W_2, by 5 hidden numbers.
    assert (found.gauss_newton, found.formula.gauss_newton) == (2 * 6 + 2 * 5, 4 * 6)
    assert not found.agree
    assert "W_1 to W_2 has rank 2, and the formulas are for 4" in found.note
    # The product is zero because the second matrix is, and the first one still shows in G.
    zero = network([6, 5, 4], [draw.normal(5, 6), torch.zeros(4, 5)])
    y = torch.zeros(30, 4, dtype=torch.float64)
    found = measure_deep_linear_ranks(zero, squared_error(), [(x, y)], at_minimum=True)
    assert found.formula == DeepLinearRanks(0, 0, 0, 50, 6, 0, 0, "squared", True)
    assert found.gauss_newton == 20
    assert "end-to-end matrix has rank 0" in found.note


def test_impossible_ranks_and_other_networks_are_refused() -> None:
    with pytest.raises(InputError, match=r"input_rank: got 7; .* between 0 and 6"):
        deep_linear_ranks([6, 4], input_rank=7)
    with pytest.raises(InputError, match=r"residual_rank: got 4; .* between 0 and 3"):
        deep_linear_ranks([6, 5, 4], residual_rank=4, loss="cross-entropy")
    with pytest.raises(InputError, match=r"residual_rank: got 1; .* between 0 and 0"):
        deep_linear_ranks([6, 5, 4], end_to_end_rank=3, residual_rank=1)
    with pytest.raises(InputError, match="Did you mean 'squared'"):
        deep_linear_ranks([6, 4], loss="square")
    with pytest.raises(InputError, match="widths"):
        deep_linear_ranks([6])
    batches = [(torch.ones(3, 2).double(), torch.ones(3, 2).double())]

    def measure(model: nn.Module, objective: Objective | None = None) -> None:
        measure_deep_linear_ranks(model, objective or squared_error(), batches)

    def line(**options: Any) -> nn.Linear:
        return nn.Linear(2, 2, bias=False, **options)

    with pytest.raises(Unsupported, match="Linear with a bias"):
        measure(nn.Sequential(nn.Linear(2, 2)).double().eval())
    with pytest.raises(Unsupported, match="a ReLU"):
        measure(nn.Sequential(line(), nn.ReLU(), line()).double().eval())
    with pytest.raises(Unsupported, match="need float64"):
        measure(nn.Sequential(line()).eval())
    shared = line(dtype=torch.float64)
    with pytest.raises(Unsupported, match="a weight of its own"):
        measure(nn.Sequential(shared, shared).eval())
    with pytest.raises(Unsupported, match="2,048"):
        measure(nn.Sequential(nn.Linear(50, 50, bias=False)).double().eval())
    with pytest.raises(InputError, match="say which formulas"):
        measure(nn.Sequential(line()).double().eval(), soft_cross_entropy())
    with pytest.raises(Unsupported, match="training mode"):
        measure(nn.Sequential(line()).double().train())
