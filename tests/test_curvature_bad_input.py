"""What is refused, with which words; what is said instead of crashing; what is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import curvature_oracles as oracles
import pico
import pytest
import torch
from curvature_oracles import relative
from torch import Tensor, nn

from hawqkit.curvature.fisher import fisher
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.objective import Objective, cross_entropy, squared_error
from hawqkit.curvature.operator import (
    BlockOperator,
    CallableOperator,
    MatrixOperator,
    SymmetricOperator,
    as_operator,
)
from hawqkit.errors import DataError, InputError, NumericalError, Unsupported
from hawqkit.models.model import wrap_model

BACKENDS = ("autograd", "forward", "difference")


class Half(nn.Module):
    """Its output leaves one of its weights out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Shared(nn.Module):
    """Two modules hold one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Root(nn.Module):
    """The root of zero is finite, its derivative is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 4, bias=False), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(x).abs().sqrt())


@pytest.mark.parametrize("make", [hessian, gauss_newton])
@pytest.mark.parametrize("products", BACKENDS)
def test_a_parameter_that_the_loss_ignores_has_a_zero_block_and_is_told(
    make: Callable[..., Any], products: str
) -> None:
    case, model = oracles.mlp(), oracles.filled(Half().double())
    op = make(model, cross_entropy(), case.batches, products=products)
    alone = make(model, cross_entropy(), case.batches, parameters=["used"], products=products)
    place = op.blocks["unused.weight"]
    V = oracles.noise(op.size, 2, seed=1)
    product = op.matmat(V)
    used = torch.cat([V[op.blocks[n]] for n in alone.blocks])
    assert not product[place].any()
    assert relative(product[: alone.size], alone.matmat(used)) <= 1e-6
    if (make, products) != (gauss_newton, "forward"):
        assert any("does not depend on unused.bias, unused.weight" in note for note in op.notes)


def test_an_objective_without_any_parameter_in_it_is_zero() -> None:
    case, model = oracles.mlp(), oracles.filled(Half().double())
    for make in (hessian, gauss_newton):
        op = make(model, cross_entropy(), case.batches, parameters=["unused"], products="autograd")
        assert not op.dense().any()
        assert any("does not depend" in note for note in op.notes)


@pytest.mark.parametrize("make", [hessian, gauss_newton])
@pytest.mark.parametrize("products", ["autograd", "forward"])
def test_an_infinite_derivative_names_parameter_and_batch(
    make: Callable[..., Any], products: str
) -> None:
    model = oracles.filled(Root().double())
    x, y = oracles.noise(6, 5, seed=1), torch.arange(6) % 4
    zero = x.clone()
    zero[2] = 0
    op = make(model, cross_entropy(), [(x, y), (x, y), (zero, y)], products=products)
    with pytest.raises(NumericalError, match=r"parameter 'inner.weight'.*in batch 2 "):
        op.matvec(oracles.noise(op.size, seed=2))
    with pytest.raises(NumericalError, match=r"layer 'inner'.*batch 2 "):
        layer_traces(model, cross_entropy(), [(x, y), (x, y), (zero, y)])


def test_a_loss_that_is_not_a_number_names_its_batch() -> None:
    case = oracles.mlp()
    x, y = case.batches[1]
    bad = [case.batches[0], (x * float("nan"), y)]
    with pytest.raises(NumericalError, match="loss of batch 1"):
        hessian(case.model, cross_entropy(), bad).matvec(oracles.noise(74, seed=1))


@pytest.mark.parametrize("products", BACKENDS)
def test_a_shared_parameter_is_one_block_with_all_its_uses(products: str) -> None:
    model = oracles.filled(Shared().double())
    x, y = oracles.noise(7, 4, seed=1), torch.arange(7) % 4
    op = hessian(model, cross_entropy(), [(x, y)], products=products)
    assert list(op.blocks) == ["first.weight"]
    case = oracles.Case(model, [(x, y)], lambda m: m(x), y, ("first.weight",))
    v = oracles.noise(16, seed=2)
    assert relative(op.matvec(v), oracles.dense_hessian(case) @ v) <= 1e-6
    by_alias = hessian(model, cross_entropy(), [(x, y)], parameters=["second.weight"])
    assert list(by_alias.blocks) == ["first.weight"]


def test_frozen_parameters_are_left_out_and_named() -> None:
    case = oracles.mlp()
    case.model[0].requires_grad_(False)
    op = hessian(case.model, cross_entropy(), case.batches)
    assert list(op.blocks) == ["2.weight", "2.bias"]
    assert "2 frozen parameters are left out: 0.weight, 0.bias" in op.notes[0]
    A = oracles.dense_hessian(case)[42:, 42:]
    assert relative(op.dense(), A) <= 1e-10
    named = hessian(case.model, cross_entropy(), case.batches, parameters=["0.weight"])
    assert named.size == 35
    assert not case.model[0].weight.requires_grad


def test_a_model_that_was_loaded_to_be_measured_is_taken_whole() -> None:
    case = oracles.mlp()
    wrapped = wrap_model(case.model, name="mlp")
    op = hessian(wrapped, cross_entropy(), case.batches)
    assert tuple(op.blocks) == case.names
    V = oracles.noise(op.size, 2, seed=1)
    assert relative(op.matmat(V), oracles.dense_hessian(case) @ V) <= 1e-10
    assert not any(p.requires_grad for p in case.model.parameters())


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="has no parameters"):
        hessian(nn.Sequential(nn.ReLU()).eval(), squared_error(), [])


def test_unknown_names_are_refused_with_the_nearest() -> None:
    case = oracles.mlp()
    with pytest.raises(InputError, match=r"matches none.*Did you mean '2.weight'"):
        hessian(case.model, cross_entropy(), case.batches, parameters=["2.weigth"])
    with pytest.raises(InputError, match=r"Did you mean 'autograd'"):
        hessian(case.model, cross_entropy(), case.batches, products="autogrand")
    with pytest.raises(InputError, match="no block"):
        hessian(case.model, cross_entropy(), case.batches).block("2.weigth")
    with pytest.raises(InputError, match="Did you mean 'gauss-newton'"):
        layer_traces(case.model, cross_entropy(), case.batches, kind="gauss_newton")
    with pytest.raises(InputError, match="no parameter of Sequential"):
        hessian(case.model, cross_entropy(), case.batches, parameters=[nn.Parameter(torch.ones(1))])


def test_training_mode_is_refused_with_the_reason() -> None:
    case = oracles.cnn()
    case.model[1].train()
    for make in (hessian, gauss_newton, fisher):
        with pytest.raises(Unsupported, match=r"'1' is in training mode.*dropout.*batch norm"):
            make(case.model, cross_entropy(), case.batches)
    with pytest.raises(Unsupported, match="training mode"):
        layer_traces(case.model, cross_entropy(), case.batches)
    case.model.eval()
    op = hessian(case.model, cross_entropy(), case.batches)
    case.model.train()
    with pytest.raises(Unsupported, match="training mode"):
        op.matvec(torch.ones(op.size))


def test_a_generator_is_refused_and_so_are_batches_that_change() -> None:
    case = oracles.mlp()
    with pytest.raises(InputError, match="once only"):
        hessian(case.model, cross_entropy(), (b for b in case.batches))
    with pytest.raises(InputError, match="got dict"):
        hessian(case.model, cross_entropy(), {"input_ids": torch.ones(1)})
    with pytest.raises(DataError, match="there is none"):
        hessian(case.model, cross_entropy(), []).matvec(torch.ones(74))

    class Augmented:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter([(x + self.passes, y) for x, y in case.batches])

    op = hessian(case.model, cross_entropy(), Augmented(), products="autograd")
    op.matvec(torch.ones(op.size))
    with pytest.raises(DataError, match="augments at random"):
        op.matvec(torch.ones(op.size))


def test_a_shuffling_loader_is_welcome() -> None:
    case = oracles.mlp()
    x, y = torch.cat([b[0] for b in case.batches]), torch.cat([b[1] for b in case.batches])
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    op = hessian(case.model, cross_entropy(), loader)
    A, V = oracles.dense_hessian(case), oracles.noise(op.size, 2, seed=1)
    for _ in range(3):
        assert relative(op.matmat(V), A @ V) <= 1e-10


def test_wrong_shapes_are_told() -> None:
    case = oracles.mlp()
    x, y = case.batches[0]
    op = hessian(case.model, cross_entropy(), case.batches)
    with pytest.raises(InputError, match=r"shape \(74,\); got \(3,\)"):
        op.matvec(torch.ones(3))
    with pytest.raises(InputError, match=r"shape \(74, k\); got \(74,\)"):
        op.matmat(torch.ones(74))
    with pytest.raises(InputError, match=r"need labels of shape \(4,\); got \(3,\)"):
        hessian(case.model, cross_entropy(), [(x, y[:3])]).matvec(torch.ones(74))
    with pytest.raises(InputError, match=r"must have the outputs' shape \(4, 4\); got \(4, 1\)"):
        hessian(case.model, squared_error(), [(x, x[:, :1])]).matvec(torch.ones(74))
    with pytest.raises(InputError, match="it must be a pair"):
        hessian(case.model, cross_entropy(), [x]).matvec(torch.ones(74))
    with pytest.raises(InputError, match="give cross_entropy"):
        hessian(case.model, cross_entropy, case.batches)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no prediction counts"):
        hessian(case.model, cross_entropy(), [(x, y * 0 - 100)]).matvec(torch.ones(74))
    own = Objective(lambda m, b: m(b[0]), lambda z, b: (z.sum(), 1))
    with pytest.raises(Unsupported, match="cannot draw labels"):
        fisher(case.model, own, case.batches)


def test_half_precision_is_allowed_and_said() -> None:
    case = oracles.mlp(dtype=torch.bfloat16)
    op = hessian(case.model, cross_entropy(), case.batches)
    A = oracles.dense_hessian(oracles.mlp())
    v = oracles.noise(op.size, seed=1)
    assert op.dtype == torch.float32
    assert relative(op.matvec(v), A @ v) < 0.05  # three digits in, two out
    assert any("bfloat16" in note and "noise floor" in note for note in op.notes)


def test_the_model_is_left_as_it_was_also_after_an_error() -> None:
    case = oracles.language(attention="sdpa")
    case.model.requires_grad_(False)
    case.model.get_parameter(case.names[3]).requires_grad_(True)
    wanted = [p.requires_grad for p in case.model.parameters()]
    config = case.model.config
    before = (torch.backends.mha.get_fastpath_enabled(), config._attn_implementation)
    math_only = torch.backends.cuda.flash_sdp_enabled()
    for products in BACKENDS:
        op = hessian(
            case.model, cross_entropy(), case.batches, parameters=case.names, products=products
        )
        op.matvec(torch.ones(op.size))
        assert any("plain matrix products" in n for n in op.notes) == (products != "difference")
    broken = [{**case.batches[0], "labels": case.batches[0]["labels"][:, :3]}]
    with pytest.raises(InputError):
        hessian(case.model, cross_entropy(), broken, parameters=case.names).matvec(
            torch.ones(op.size)
        )
    assert [p.requires_grad for p in case.model.parameters()] == wanted
    assert all(p.grad is None for p in case.model.parameters())
    assert (torch.backends.mha.get_fastpath_enabled(), config._attn_implementation) == before
    assert torch.backends.cuda.flash_sdp_enabled() == math_only


class Once(torch.autograd.Function):
    """A square whose backward pass cannot be differentiated, nor has it a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


def test_auto_says_what_it_took_and_what_was_not_possible() -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.inner(x))

    case = oracles.mlp()
    assert hessian(case.model, cross_entropy(), case.batches).backend == "autograd"
    model = oracles.filled(Squares().double())
    op = hessian(model, cross_entropy(), case.batches)
    assert op.backend == "difference"
    assert "autograd is not possible" in op.backend_reason
    assert "forward is not possible" in op.backend_reason
    x, y = torch.cat([b[0] for b in case.batches]), torch.cat([b[1] for b in case.batches])
    plain = oracles.Case(model, [], lambda m: m.inner(x) ** 2, y, oracles.all_names(model))
    v = oracles.noise(op.size, seed=1)
    assert relative(op.matvec(v), oracles.dense_hessian(plain) @ v) <= 1e-6
    with pytest.raises(Unsupported, match="autograd is not possible"):
        hessian(model, cross_entropy(), case.batches, products="autograd").matvec(v)


@pytest.mark.parametrize("measure", ["product", "traces"])
def test_a_severed_derivative_is_seen_also_where_the_loss_is_linear(measure: str) -> None:
    """Then torch leaves no node that raises: the gradient just has no graph, as for a constant."""

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 4)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.inner(x))

    model = oracles.filled(Squares().double())
    batches = [(oracles.noise(3, 5, seed=1), torch.zeros(3))]
    linear = Objective(outputs=lambda m, b: m(b[0]), loss=lambda z, b: (z.sum(), len(z)))
    if measure == "traces":
        with pytest.raises(Unsupported, match="once_differentiable"):
            layer_traces(model, linear, batches)
        return
    op = hessian(model, linear, batches)
    assert op.backend == "difference"
    x = torch.cat([batches[0][0], torch.ones(3, 1).double()], 1)
    block = 2 * x.T @ x / 3  # of each output's weights and bias; the parameters lie otherwise
    assert op.dense().trace() == pytest.approx(float(4 * block.trace()), rel=1e-6)


def test_plain_operators_keep_the_laws() -> None:
    A = oracles.noise(6, 6, seed=1)
    A = A + A.T
    blocks = {"a": slice(0, 2), "b": slice(2, 3), "c": slice(3, 6)}
    V = oracles.noise(6, 3, seed=2)
    for op in (
        MatrixOperator(A, blocks=blocks),
        CallableOperator(lambda v: A @ v, 6, blocks=blocks),
    ):
        assert relative(op @ V, A @ V) <= 1e-14
        assert relative(op @ V[:, 0], A @ V[:, 0]) <= 1e-14
        assert op.products == 4
        part = op.block("c", "a")
        index = [0, 1, 3, 4, 5]
        assert isinstance(part, BlockOperator)
        assert relative(part.dense(), A[index][:, index]) <= 1e-14
        assert op.check_symmetric() < 1e-14
    assert as_operator(A.float()).matvec(V[:, 0]).dtype == torch.float32


def test_what_is_no_symmetric_operator_is_refused() -> None:
    skew = oracles.noise(30, 30, seed=3)
    share = float((skew - skew.T).norm() / skew.norm())
    with pytest.raises(NumericalError, match="not symmetric"):
        MatrixOperator(skew).check_symmetric()
    assert abs(MatrixOperator(skew).asymmetry(pairs=400) / share - 1) < 0.15
    with pytest.raises(InputError, match="square"):
        as_operator(torch.ones(2, 3))
    with pytest.raises(InputError, match="pass it too"):
        as_operator(lambda v: v)
    with pytest.raises(InputError, match="got str"):
        as_operator("H")  # type: ignore[arg-type]
    blocks = {"a": slice(0, 1), "b": slice(1, 2)}
    infinite = CallableOperator(lambda v: v / torch.tensor([1, 0]), 2, blocks=blocks)
    with pytest.raises(NumericalError, match="block 'b' at place 1"):
        infinite.matvec(torch.ones(2))
    with pytest.raises(InputError, match="shape"):
        CallableOperator(lambda v: v[:1], 2).matvec(torch.ones(2))
    assert issubclass(MatrixOperator, SymmetricOperator)


def test_encoders_are_not_shifted_and_need_labels() -> None:
    model = pico.bert().double()
    tokens = torch.randint(8, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "attention_mask": torch.ones(2, 6), "labels": tokens}
    z = cross_entropy().outputs(model, batch)
    assert z.shape[:2] == (2, 6)
    with pytest.raises(InputError, match="add labels"):
        cross_entropy().outputs(model, {"input_ids": tokens})
