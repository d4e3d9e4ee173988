"""The gradient's share of the top eigenspace, against dense eigenvectors, over checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import curvature_oracles as oracles
import numpy as np
import pytest
import torch
from curvature_oracles import Case
from safetensors.torch import save_file
from torch import Tensor, nn

from hawqkit.curvature.objective import cross_entropy
from hawqkit.errors import DataError, InputError, NumericalError, StateMismatch
from hawqkit.spectrum.gradient_share import gradient_share, gradient_shares

# The share is as good as the eigenvectors: off by up to residual over gap, and the gaps of these
# small networks are a hundredth of the largest eigenvalue.
SHARP = 1e-10


def dense_gradient(case: Case) -> Tensor:
    w, predictions = oracles.of_weights(case)

    def mean_loss(w: Tensor) -> Tensor:
        return nn.functional.cross_entropy(predictions(w), case.targets)

    return torch.func.grad(mean_loss)(w).detach()


def dense_share(case: Case, k: int, *, gauss_newton: bool = False) -> float:
    A = oracles.dense_gauss_newton(case) if gauss_newton else oracles.dense_hessian(case)
    g = dense_gradient(case)
    V = torch.linalg.eigh(A.detach())[1][:, -k:]
    return float(((V.T @ g) ** 2).sum() / (g @ g))


def trained(case: Case, steps: int, rate: float) -> list[dict[str, Tensor]]:
    """Train a case by plain gradient descent and return its states, the first before any step."""
    states = []
    for step in range(steps + 1):
        states.append({n: t.detach().clone() for n, t in case.model.state_dict().items()})
        if step == steps:
            break
        loss = nn.functional.cross_entropy(case.predict(case.model), case.targets)
        gradients = torch.autograd.grad(loss, list(case.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(case.model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return states


def classifier() -> Case:
    """Three classes of thirty points that overlap, and a network of 73 weights."""
    y = torch.arange(90) % 3
    x = 2 * torch.eye(3, 6, dtype=torch.float64)[y] + oracles.noise(90, 6, seed=1)
    model = oracles.filled(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)).double())
    batches = [(x[:40], y[:40]), (x[40:], y[40:])]
    return Case(model, batches, lambda m: m(x), y, oracles.all_names(model))


@pytest.mark.parametrize("make", [oracles.mlp, oracles.cnn])
@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
def test_the_share_is_that_of_dense_eigenvectors(make: type[Case], kind: str) -> None:
    case = make()
    for k in (1, 4):
        found = gradient_share(
            case.model, cross_entropy(), case.batches, k, kind=kind, tolerance=SHARP
        )
        truth = dense_share(case, k, gauss_newton=kind != "hessian")
        assert found.share == pytest.approx(truth, abs=1e-8)
        assert sum(found.shares) == pytest.approx(found.share, abs=1e-15)
        assert found.converged
        assert found.gradient_norm == pytest.approx(float(dense_gradient(case).norm()), rel=1e-12)
        assert (found.k, found.size, found.null) == (k, len(dense_gradient(case)), k / found.size)


def test_the_share_is_off_by_no_more_than_residual_over_gap() -> None:
    case, k = oracles.mlp(), 4
    values = torch.linalg.eigvalsh(oracles.dense_hessian(case)).flip(0)
    found = gradient_share(case.model, cross_entropy(), case.batches, k, tolerance=1e-3)
    sine = float(np.linalg.norm(found.residuals)) / float(values[k - 1] - values[k])
    assert abs(found.share - dense_share(case, k)) <= 2 * sine
    assert sine < 0.2


def test_parameters_are_those_of_matrix_and_gradient_alike() -> None:
    case = oracles.mlp()
    case.names = ("2.weight", "2.bias")
    found = gradient_share(
        case.model,
        cross_entropy(),
        case.batches,
        3,
        parameters=(n for n in case.names),
        tolerance=SHARP,
    )
    assert found.size == 32
    assert found.share == pytest.approx(dense_share(case, 3), abs=1e-8)


def test_random_directions_have_the_null_share_and_its_spread() -> None:
    found = gradient_share(classifier().model, cross_entropy(), classifier().batches, 5)
    directions = oracles.noise(4000, found.size, seed=9)
    shares = (directions[:, :5] ** 2).sum(1) / (directions**2).sum(1)
    assert float(shares.mean()) == pytest.approx(found.null, abs=4 * found.null_stderr / 4000**0.5)
    # The standard deviation of a sample of 4,000 is off by about 1 % here.
    assert float(shares.std()) == pytest.approx(found.null_stderr, rel=0.05)


def test_after_training_the_share_is_far_above_that_of_a_random_direction() -> None:
    """Steps as long as 2 over the largest eigenvalue make the gradient swing along the top."""
    case = classifier()
    states = trained(case, 40, rate=2.0)[::10]
    found = gradient_shares(case.model, cross_entropy(), case.batches, states, k=3, tolerance=SHARP)
    assert [share.state for share in found] == ["0", "1", "2", "3", "4"]
    assert found[0].null == 3 / 73
    for share, state in zip(found, states, strict=True):
        case.model.load_state_dict(state)
        assert share.share == pytest.approx(dense_share(case, 3), abs=1e-8)
    for share in found[2:]:
        assert share.share > 10 * share.null
        assert share.share - share.null > 10 * share.null_stderr
        assert share.times_null == pytest.approx(share.share * 73 / 3)


def test_short_steps_on_all_data_use_up_the_top_of_the_gradient() -> None:
    """Descent itself takes the steep directions first: nothing of them is left after a while."""
    case = classifier()
    states = trained(case, 40, rate=0.5)[::20]
    found = gradient_shares(case.model, cross_entropy(), case.batches, states, k=3)
    assert found[0].share > 0.1
    assert found[-1].share < 0.1 * found[-1].null


def bits(model: nn.Module) -> dict[str, bytes]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        n: t.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()
    }


def moved_state(model: nn.Module, by: float = 0.01) -> dict[str, Tensor]:
    return {
        n: t.detach() + by if t.is_floating_point() else t.detach() + 1
        for n, t in model.state_dict().items()
    }


def test_files_are_read_and_the_models_own_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    case = oracles.cnn()
    before = bits(case.model)
    state = moved_state(case.model)
    save_file(state, tmp_path / "step-1.safetensors")
    (found,) = gradient_shares(
        case.model,
        cross_entropy(),
        case.batches,
        [tmp_path / "step-1.safetensors"],
        k=2,
        tolerance=SHARP,
    )
    assert bits(case.model) == before
    assert found.state.endswith("step-1.safetensors")
    named = gradient_shares(
        case.model, cross_entropy(), case.batches, {"one": state}, k=2, tolerance=SHARP
    )
    assert named[0].state == "one"
    case.model.load_state_dict(state)  # its running statistics are other ones, too
    assert found.share == pytest.approx(dense_share(case, 2), abs=1e-8)
    assert named[0].share == found.share


def test_an_error_on_the_way_gives_the_state_back_too() -> None:
    case = oracles.cnn()
    before = bits(case.model)

    def checkpoints() -> Iterator[dict[str, Tensor]]:
        yield moved_state(case.model)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gradient_shares(case.model, cross_entropy(), case.batches, checkpoints(), k=1)
    assert bits(case.model) == before
    broken = moved_state(case.model)
    broken["0.weight"] = broken["0.weight"] * torch.nan
    with pytest.raises(NumericalError):
        gradient_shares(case.model, cross_entropy(), case.batches, [broken], k=1)
    assert bits(case.model) == before


def test_a_shared_weight_may_stand_in_a_file_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    oracles.filled(model)
    model[2].weight = model[0].weight
    batches = [(oracles.noise(6, 4, seed=1), torch.arange(6) % 4)]
    state = {n: t for n, t in moved_state(model).items() if n != "2.weight"}
    (found,) = gradient_shares(model, cross_entropy(), batches, [state], k=2)
    model.load_state_dict(state, strict=False)
    alone = gradient_share(model, cross_entropy(), batches, 2)
    assert found.share == alone.share
    assert found.size == 24


def test_checkpoints_that_do_not_fit_are_refused_before_anything_is_copied(tmp_path: Path) -> None:
    case = oracles.mlp()
    before = bits(case.model)
    state = moved_state(case.model)

    def measure(checkpoint: object) -> None:
        gradient_shares(case.model, cross_entropy(), case.batches, [checkpoint], k=1)  # type: ignore[list-item]

    with pytest.raises(StateMismatch, match=r"holds no '2\.weight', nor 1 more"):
        measure({n: t for n, t in state.items() if not n.startswith("2")})
    with pytest.raises(StateMismatch, match=r"'0\.weigth'.*mean '0\.weight'"):
        measure({("0.weigth" if n == "0.weight" else n): t for n, t in state.items()})
    with pytest.raises(StateMismatch, match=r"shape \(7,\), the model's has \(7, 5\)"):
        measure(state | {"0.weight": state["0.bias"]})
    case.model.float()
    with pytest.raises(StateMismatch, match="without rounding"):
        measure(state)
    case.model.double()
    with pytest.raises(InputError, match="got int"):
        measure(3)
    (tmp_path / "model.bin").write_bytes(b"no safetensors")
    with pytest.raises(DataError, match="cannot be read as safetensors"):
        measure(tmp_path / "model.bin")
    with pytest.raises(InputError, match="a single one"):
        gradient_shares(case.model, cross_entropy(), case.batches, state, k=1)
    with pytest.raises(DataError, match="there is none"):
        gradient_shares(case.model, cross_entropy(), case.batches, [], k=1)
    assert set(before) == set(bits(case.model))


def test_a_zero_gradient_has_no_share_and_says_so() -> None:
    model = nn.Linear(3, 2, bias=False).double().eval()
    nn.init.zeros_(model.weight)
    x = torch.ones(2, 3, dtype=torch.float64)
    found = gradient_share(model, cross_entropy(), [(x, torch.tensor([0, 1]))], 1)
    assert found.gradient_norm == 0
    assert np.isnan(found.share)
    assert "gradient is zero" in found.note


def test_more_eigenvectors_than_dimensions_are_refused() -> None:
    case = oracles.mlp()
    with pytest.raises(InputError, match="k: 100"):
        gradient_share(case.model, cross_entropy(), case.batches, 100)
    with pytest.raises(InputError, match="kind: got 'fisher'"):
        gradient_share(case.model, cross_entropy(), case.batches, 1, kind="fisher")
