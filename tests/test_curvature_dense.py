"""Every operator and back-end against dense matrices that torch.func makes another way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import curvature_oracles as oracles
import pytest
import torch
from curvature_oracles import Case, relative
from torch import Tensor, nn

from hawqkit.curvature.fisher import empirical_fisher, fisher
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.objective import Objective, cross_entropy, squared_error
from hawqkit.errors import NumericalError

CASES: dict[str, Callable[[], Case]] = {
    "mlp": oracles.mlp,
    "mlp, squared error": lambda: oracles.mlp(loss="squared"),
    "cnn": oracles.cnn,
    "gpt2": oracles.language,
    "gpt2, fused attention": lambda: oracles.language(attention="sdpa"),
    "llama": lambda: oracles.language("llama"),
}
# Norms, rotary embeddings and softmax of transformers' Llama run in float32 whatever the weights
# are.
EXACT = dict.fromkeys(CASES, 1e-10) | {"llama": 1e-6}


@cache
def case_of(name: str) -> Case:
    return CASES[name]()


@cache
def dense(name: str, kind: str) -> Tensor:
    make = oracles.dense_hessian if kind == "hessian" else oracles.dense_gauss_newton
    # Fused attention has no second derivative to compare with; its plain form is the same function.
    return make(case_of(name.removesuffix(", fused attention")))


def objective_of(case: Case) -> Objective:
    return cross_entropy() if case.loss == "cross-entropy" else squared_error()


def vectors(size: int, count: int = 3) -> Tensor:
    return oracles.noise(size, count, seed=9)


@pytest.mark.parametrize("products", ["autograd", "forward"])
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", CASES)
def test_exact_products_are_those_of_the_dense_matrix(name: str, kind: str, products: str) -> None:
    case = case_of(name)
    make = hessian if kind == "hessian" else gauss_newton
    op = make(
        case.model, objective_of(case), case.batches, parameters=case.names, products=products
    )
    A, V = dense(name, kind), vectors(op.size)
    assert op.size == len(A)
    assert relative(op.matmat(V), A @ V) <= EXACT[name]
    assert relative(op.matvec(V[:, 0]), A @ V[:, 0]) <= EXACT[name]
    assert (op.backend, op.products) == (products, 4)


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp", "mlp, squared error", "cnn", "gpt2"])
def test_differences_in_float64(name: str, kind: str) -> None:
    case = case_of(name)
    make = hessian if kind == "hessian" else gauss_newton
    op = make(
        case.model, objective_of(case), case.batches, parameters=case.names, products="difference"
    )
    before = [p.detach().clone() for p in case.model.parameters()]
    V = vectors(op.size, 2)
    assert relative(op.matmat(V), dense(name, kind) @ V) <= 1e-6
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_differences_in_float32_on_smooth_networks(name: str, kind: str) -> None:
    case = {"mlp": oracles.mlp, "cnn": oracles.cnn}[name](dtype=torch.float32)
    make = hessian if kind == "hessian" else gauss_newton
    op = make(case.model, cross_entropy(), case.batches, products="difference")
    V = vectors(op.size, 2)
    assert relative(op.matmat(V), dense(name, kind) @ V) <= 1e-2


class Waves(nn.Module):
    """Smooth, with derivatives that grow by a factor of 12 from each to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(12 * x @ self.weight)


def test_differences_go_to_shorter_steps_where_the_first_is_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    data = [(x[:3], torch.zeros(3, 4)), (x[3:], torch.ones(2, 4))]
    exact = hessian(Waves().eval().double(), squared_error(), in_float64(data)).dense()
    op = hessian(Waves().eval(), squared_error(), data, products="difference")
    V = vectors(12, 3)
    assert relative(op.matmat(V.float()).double(), exact @ V) <= 1e-2
    monkeypatch.setattr("hawqkit.curvature.products.difference.SHORTER", (1.0,))
    op = hessian(Waves().eval(), squared_error(), data, products="difference")
    with pytest.raises(NumericalError, match="more than 1%"):
        op.matmat(V.float())


def in_float64(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(x.double(), y.double()) for x, y in data]


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_differences_are_refused_on_kinks(kind: str) -> None:
    case = oracles.cnn(dtype=torch.float32, relu=True)
    make = hessian if kind == "hessian" else gauss_newton
    op = make(case.model, cross_entropy(), case.batches, products="difference")
    before = [p.detach().clone() for p in case.model.parameters()]
    with pytest.raises(NumericalError, match="not smooth"):
        op.matvec(vectors(op.size)[:, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


@pytest.mark.parametrize("products", ["autograd", "forward", "difference"])
@pytest.mark.parametrize("name", ["mlp", "mlp, squared error", "cnn"])
def test_sampled_fisher_given_the_same_labels(name: str, products: str) -> None:
    case = case_of(name)
    op = fisher(case.model, objective_of(case), case.batches, products=products, seed=3)
    F = oracles.dense_outer(case, oracles.drawn_residuals(case, 3))
    V = vectors(op.size)
    assert relative(op.matmat(V), F @ V) <= (1e-6 if products == "difference" else 1e-10)


def test_mean_of_sampled_fishers_is_the_gauss_newton_matrix() -> None:
    case = case_of("gpt2")
    G = dense("gpt2", "gauss-newton")
    V = vectors(len(G), 1)
    for unit in ("prediction", "example"):
        made = torch.stack(
            [
                fisher(
                    case.model,
                    cross_entropy(),
                    case.batches,
                    parameters=case.names,
                    unit=unit,
                    seed=seed,
                ).matmat(V)
                for seed in range(60)
            ]
        )[:, :, 0]
        form = made @ V[:, 0]
        stderr = float(form.std() / len(form) ** 0.5)
        assert abs(float((form.mean() - V[:, 0] @ G @ V[:, 0]).detach())) <= 4 * stderr, unit


@pytest.mark.parametrize("name", ["mlp", "mlp, squared error", "cnn", "gpt2"])
def test_empirical_fisher_of_predictions(name: str) -> None:
    case = case_of(name)
    op = empirical_fisher(case.model, objective_of(case), case.batches, parameters=case.names)
    E = oracles.dense_outer(case, oracles.true_residuals(case))
    V = vectors(op.size)
    assert relative(op.matmat(V), E @ V) <= 1e-10


def test_empirical_fisher_of_sequences() -> None:
    case = case_of("gpt2")
    op = empirical_fisher(
        case.model, cross_entropy(), case.batches, parameters=case.names, unit="example"
    )
    counts = [
        int((b["labels"][:, 1:] != -100).sum(1)[i])
        for b in case.batches
        for i in range(len(b["labels"]))
    ]
    groups = [i for i, n in enumerate(counts) for _ in range(n)]
    E = oracles.dense_outer(case, oracles.true_residuals(case), groups)
    V = vectors(op.size)
    assert relative(op.matmat(V), E @ V) <= 1e-10


@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2"])
@pytest.mark.parametrize("products", ["autograd", "forward", "difference"])
def test_blocks_are_principal_submatrices(name: str, products: str) -> None:
    case = case_of(name)
    op = hessian(
        case.model, objective_of(case), case.batches, parameters=case.names, products=products
    )
    chosen = (case.names[-2], case.names[0])  # given back in the model's order
    block = op.block(*chosen)
    places = oracles.places(case)
    index = torch.cat(
        [torch.arange(s.start, s.stop) for s in (places[case.names[0]], places[case.names[-2]])]
    )
    A = dense(name, "hessian")[index][:, index]
    V = vectors(block.size, 2)
    assert tuple(block.blocks) == (case.names[0], case.names[-2])
    assert relative(block.matmat(V), A @ V) <= (1e-6 if products == "difference" else 1e-10)


def test_kept_graphs_give_the_same_products_also_in_blocks_and_after_weights_change() -> None:
    case = oracles.mlp()
    op = hessian(case.model, cross_entropy(), case.batches, keep_graphs=True)
    V = vectors(op.size, 2)
    assert relative(op.matmat(V), oracles.dense_hessian(case) @ V) <= 1e-10
    name = case.names[2]
    place = oracles.places(case)[name]
    with torch.no_grad():
        case.model.get_parameter(case.names[0]).mul_(1.5)
    A = oracles.dense_hessian(case)
    assert relative(op.block(name).matmat(V[place]), A[place, place] @ V[place]) <= 1e-10
    assert relative(op.matmat(V), A @ V) <= 1e-10


def test_a_small_memory_limit_changes_nothing() -> None:
    case = case_of("cnn")
    for products in ("autograd", "forward"):
        op = hessian(case.model, cross_entropy(), case.batches, products=products, memory_bytes=1)
        V = vectors(op.size, 4)
        assert relative(op.matmat(V), dense("cnn", "hessian") @ V) <= 1e-10


def test_a_loss_of_ones_own_needs_its_sum_and_count_alone() -> None:
    case = case_of("mlp, squared error")
    own = Objective(
        outputs=lambda model, batch: model(batch[0]),
        loss=lambda z, batch: (((z - batch[1]) ** 2).sum() / 2, len(z)),
    )
    V = vectors(len(dense("mlp, squared error", "hessian")))
    for make, kind in ((hessian, "hessian"), (gauss_newton, "gauss-newton")):
        op = make(case.model, own, case.batches)
        assert relative(op.matmat(V), dense("mlp, squared error", kind) @ V) <= 1e-10


def test_operators_are_symmetric() -> None:
    case = case_of("gpt2")
    for make in (hessian, gauss_newton, fisher, empirical_fisher):
        op = make(case.model, cross_entropy(), case.batches, parameters=case.names)
        assert op.check_symmetric() <= 1e-12
