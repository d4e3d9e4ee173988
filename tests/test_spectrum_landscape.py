"""The loss along lines and planes: closed forms, other ways to move weights, and restoration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import curvature_oracles as oracles
import numpy as np
import pico
import pytest
import torch
from processes import run_on_two
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.records import Landscape
from hawqkit.store import read_record, write_record

CASES = {
    "mlp": oracles.mlp,
    "cnn": lambda: oracles.cnn(relu=True),
    "gpt2": lambda: oracles.language("gpt2"),
    "squared error": lambda: oracles.mlp(loss="squared-error"),
}


def regression() -> tuple[nn.Linear, list[Any], Tensor, Tensor]:
    """Return a linear regression in uneven batches, with its gradient and Hessian by hand."""
    net = oracles.filled(nn.Linear(5, 1, bias=False)).double()
    x, y = oracles.noise(12, 5, seed=1), oracles.noise(12, 1, seed=2)
    w = net.weight.detach()[0]
    batches = [(x[:3], y[:3]), (x[3:10], y[3:10]), (x[10:], y[10:])]
    return net, batches, x.T @ (x @ w - y[:, 0]) / 12, x.T @ x / 12


def objective_of(case: oracles.Case) -> hk.Objective:
    return hk.cross_entropy() if case.loss == "cross-entropy" else hk.squared_error()


def recorded(net: nn.Module, **options: Any) -> list[dict[str, Tensor]]:
    """Return the weights that each pass over the data ran with."""
    seen: list[dict[str, Tensor]] = []

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        return torch.zeros(1, 1)

    watching = hk.Objective(outputs, lambda z, batch: (z.sum(), 1))
    hk.loss_landscape(net, watching, [(torch.zeros(1),)], quadratic=False, **options)
    return seen


def direction_of(net: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Return the direction that the weights were moved along, by difference."""
    _, _, last = recorded(net, steps=3, distance=1.0, **options)
    return {n: last[n] - p.detach() for n, p in net.named_parameters()}


def test_of_a_linear_regression_line_and_plane_are_exactly_quadratic() -> None:
    net, batches, g, H = regression()
    D = oracles.noise(5, 2, seed=3)
    start = float(hk.loss_landscape(net, hk.squared_error(), batches, directions="random").center)
    t = torch.linspace(-2, 2, 7, dtype=torch.float64)
    line = hk.loss_landscape(
        net, hk.squared_error(), batches, directions=D[:, 0], steps=7, distance=2.0
    )
    expected = start + t * (g @ D[:, 0]) + t**2 / 2 * (D[:, 0] @ H @ D[:, 0])
    np.testing.assert_allclose(line.values, expected, rtol=1e-12)
    plane = hk.loss_landscape(
        net, hk.squared_error(), batches, directions=D, steps=(7, 4), distance=(2.0, 0.5)
    )
    s = torch.linspace(-0.5, 0.5, 4, dtype=torch.float64)
    points = torch.stack(torch.meshgrid(t, s, indexing="ij"), -1)  # (7, 4, 2)
    C = D.T @ H @ D
    expected = start + points @ (D.T @ g) + torch.einsum("ija,ab,ijb->ij", points, C, points) / 2
    np.testing.assert_allclose(plane.values, expected, rtol=1e-12)
    np.testing.assert_allclose(plane.quadratic_values, plane.values, rtol=1e-12)
    np.testing.assert_allclose(plane.curvatures, C, rtol=1e-12)
    np.testing.assert_allclose([a.slope for a in plane.axes], D.T @ g, rtol=1e-12)
    assert plane.center == pytest.approx(start, rel=1e-14)
    assert plane.count == 12


def test_along_an_eigenvector_at_the_minimum_the_loss_is_half_lambda_t_squared() -> None:
    net, batches, g, H = regression()
    with torch.no_grad():
        net.weight -= torch.linalg.solve(H, g)[None]
    found = hk.loss_landscape(net, hk.squared_error(), batches, directions="top-2", steps=9)
    second = float(torch.linalg.eigvalsh(H)[-2])
    t = found.positions()
    assert found.axes[0].eigenvalue == pytest.approx(second, rel=1e-7)  # residual 1e-4, squared
    assert found.axes[0].length == pytest.approx(1.0, rel=1e-12)
    np.testing.assert_allclose(found.values - found.center, second * t**2 / 2, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_weights_put_in_by_functional_call(name: str) -> None:
    case = CASES[name]()
    w, predictions = oracles.of_weights(case)
    d = oracles.noise(len(w), seed=5) / 20

    def loss(w: Tensor) -> float:
        z = predictions(w)
        if case.loss == "cross-entropy":
            return float(nn.functional.cross_entropy(z, case.targets))
        return float(((z - case.targets) ** 2).sum(-1).mean() / 2)

    found = hk.loss_landscape(
        case.model, objective_of(case), case.batches, directions=d, steps=4, parameters=case.names
    )
    step = 1e-5  # central differences: truncation step^2, rounding eps / step
    with torch.no_grad():
        expected = [loss(w + t * d) for t in found.positions()]
        np.testing.assert_allclose(found.values, expected, rtol=1e-12)
        assert found.center == pytest.approx(loss(w), rel=1e-12)
        slope = (loss(w + step * d) - loss(w - step * d)) / (2 * step)
    assert found.axes[0].slope == pytest.approx(slope, rel=1e-6)


def test_a_wrapped_model_and_ignored_labels_give_the_same_as_one_batch() -> None:
    case = oracles.language("llama")
    model = hk.wrap_model(case.model, name="pico")
    found = hk.loss_landscape(
        model, hk.cross_entropy(), case.batches, directions="random", steps=3, parameters=case.names
    )
    with torch.no_grad():
        expected = nn.functional.cross_entropy(case.predict(case.model), case.targets)
    assert found.center == pytest.approx(float(expected), rel=1e-12)
    assert found.count == len(case.targets)
    assert found.model == "pico"


def layers_of_every_kind() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    pico.llama()  # transformers knows Conv1D from here on
    return oracles.filled(
        nn.ModuleDict(
            {
                "conv": nn.Conv2d(2, 3, 3),
                "norm": nn.BatchNorm2d(3),
                "up": nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False),
                "stored": Conv1D(5, 4),
                "out": nn.Linear(5, 2),
            }
        )
    ).double()


def filters(name: str, tensor: Tensor) -> Tensor:
    """Return what makes one output as a row, by hand."""
    if name == "stored.weight":  # (inputs, outputs)
        return tensor.T
    if name == "up.weight":  # (2 groups of 2 inputs, 3 outputs of a group, ...)
        pairs = [(group, j) for group in (0, 1) for j in (0, 1, 2)]
        return torch.stack([tensor[2 * group : 2 * group + 2, j].flatten() for group, j in pairs])
    return tensor.flatten(1) if tensor.ndim > 1 else tensor[None]


def test_filters_of_random_directions_have_the_norm_of_the_weights_filters() -> None:
    net = layers_of_every_kind()
    drawn = direction_of(net, directions="random", normalize=None, biases=True)
    found = direction_of(net, directions="random")
    for name, weight in net.named_parameters():
        if weight.ndim < 2:
            assert not found[name].any(), name
            continue
        w, raw, d = (filters(name, x) for x in (weight.detach(), drawn[name], found[name]))
        expected = raw * (w.norm(dim=1) / raw.norm(dim=1))[:, None]
        torch.testing.assert_close(d, expected, rtol=1e-10, atol=1e-12)


def test_biases_can_be_moved_too_and_count_as_one_filter() -> None:
    net = layers_of_every_kind()
    found = direction_of(net, directions="random", biases=True)
    for name, weight in net.named_parameters():
        if weight.ndim == 1:
            assert float(found[name].norm()) == pytest.approx(
                float(weight.detach().norm()), rel=1e-10
            )


@pytest.mark.parametrize("normalize", ["layer", "unit", None])
def test_other_lengths_are_those_of_parameters_of_one_or_as_drawn(normalize: str | None) -> None:
    net = layers_of_every_kind()
    found = direction_of(net, directions="random", normalize=normalize, seed=4)
    total = torch.cat([d.flatten() for d in found.values()]).norm()
    if normalize == "layer":
        for name, weight in net.named_parameters():
            if weight.ndim > 1:
                assert float(found[name].norm()) == pytest.approx(
                    float(weight.detach().norm()), rel=1e-10
                )
    elif normalize == "unit":
        assert float(total) == pytest.approx(1.0, rel=1e-10)
    else:
        drawn = sum(p.numel() for p in net.parameters() if p.ndim > 1)
        assert float(total) == pytest.approx(drawn**0.5, rel=0.25)  # 5 standard errors, 1/sqrt(2n)


def test_random_directions_follow_the_seed_and_differ_from_each_other() -> None:
    net = layers_of_every_kind()
    first, again, other = (direction_of(net, directions="random", seed=s) for s in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first["out.weight"], other["out.weight"])
    case = oracles.mlp()
    found = hk.loss_landscape(
        case.model, hk.cross_entropy(), case.batches, directions=("random", "random"), steps=2
    )
    assert found.cosine is not None
    assert abs(found.cosine) < 0.6
    assert [a.name for a in found.axes] == ["random 1", "random 2"]


def test_the_first_index_of_a_plane_is_the_first_direction() -> None:
    net = nn.Linear(2, 1, bias=False).double().eval()
    with torch.no_grad():
        net.weight.zero_()
    x = torch.eye(2, dtype=torch.float64)
    first, second = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    y = torch.tensor([[3.0], [0.0]]).double()  # the loss falls with the first weight alone
    found = hk.loss_landscape(
        net, hk.squared_error(), [(x, y)], directions=(first, second), steps=(3, 2), distance=1.0
    )
    assert found.values.shape == (3, 2)
    assert found.values.tolist() == [[4.25, 4.25], [2.5, 2.5], [1.25, 1.25]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("passes", [1, 6, 21])
def test_weights_are_the_same_storage_and_bits_after_an_error(
    error: type[BaseException], passes: int
) -> None:
    case = oracles.mlp(dtype=torch.float32)
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in case.model.named_parameters()}
    calls = 0

    def outputs(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == passes:
            raise error("stop")
        return model(batch[0])

    failing = hk.Objective(outputs, hk.cross_entropy().loss)
    with pytest.raises(error, match="stop"):
        hk.loss_landscape(
            case.model, failing, case.batches, directions="random", quadratic=False, steps=7
        )
    assert calls == passes
    for name, parameter in case.model.named_parameters():
        place, bits = before[name]
        assert parameter.data_ptr() == place
        assert torch.equal(parameter.detach(), bits)


def test_afterwards_the_model_and_its_flags_are_as_they_were() -> None:
    case = oracles.cnn()
    case.model[0].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in case.model.state_dict().items()}
    hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, steps=3)
    assert all(torch.equal(t, before[n]) for n, t in case.model.state_dict().items())
    assert [p.requires_grad for p in case.model.parameters()][:2] == [False, True]
    assert all(p.grad is None for p in case.model.parameters())


def test_frozen_parameters_are_not_moved() -> None:
    net = layers_of_every_kind()
    net["conv"].weight.requires_grad_(False)
    assert not direction_of(net, directions="random")["conv.weight"].any()


def test_a_mapping_and_eigenpairs_of_a_block_leave_the_rest_alone() -> None:
    case = oracles.mlp()
    H = hk.hessian(case.model, hk.cross_entropy(), case.batches)
    pairs = hk.top_eigenpairs(H.block("2.weight"), 2)
    by_pairs = hk.loss_landscape(
        case.model, hk.cross_entropy(), case.batches, directions=pairs, steps=3
    )
    named = {"2.weight": pairs.vectors[:, 0].reshape(4, 7)}
    by_name = hk.loss_landscape(
        case.model, hk.cross_entropy(), case.batches, directions=named, steps=3
    )
    np.testing.assert_allclose(by_name.values, by_pairs.values[:, 1], rtol=1e-12)
    assert [a.eigenvalue for a in by_pairs.axes] == pairs.values.tolist()
    place = oracles.places(case)["2.weight"]
    top = torch.linalg.eigvalsh(oracles.dense_hessian(case)[place, place]).max()
    assert by_pairs.curvatures is not None
    assert by_pairs.curvatures[0][0] == pytest.approx(float(top), rel=1e-9)


def test_the_gradient_is_a_unit_direction_whose_slope_is_its_length() -> None:
    net, batches, g, _ = regression()
    found = hk.loss_landscape(net, hk.squared_error(), batches, directions="gradient", steps=3)
    assert found.axes[0].length == pytest.approx(1.0, rel=1e-12)
    assert found.axes[0].slope == pytest.approx(float(g.norm()), rel=1e-12)


def test_a_record_survives_json(tmp_path: Path) -> None:
    case = oracles.mlp()
    found = hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, steps=(3, 2))
    path = write_record(tmp_path / "landscape.json", found)
    assert read_record(path, Landscape) == found
    assert json.loads(path.read_text())["model_hash"]


SCRIPT = """
import json, sys
from pathlib import Path
import curvature_oracles as oracles
import hawqkit as hk
from hawqkit.distributed import finish, processes
case = oracles.mlp()
me = processes()
found = {"processes": me.count}
for name in ("top-1", "random", "gradient"):
    one = hk.loss_landscape(case.model, hk.cross_entropy(), case.batches, directions=name, steps=5)
    found[name] = [*one.values.tolist(), one.center, one.axes[0].slope, *one.curvatures[0]]
Path(sys.argv[1] + str(me.index)).write_text(json.dumps(found))
finish()
"""


@pytest.mark.timeout(400)  # two interpreters that import torch, on cores that others use
def test_two_processes_measure_the_landscape_of_one(tmp_path: Path) -> None:
    script = tmp_path / "landscape.py"
    script.write_text(SCRIPT)
    run_on_two(str(script), str(tmp_path / "two"))
    case = oracles.mlp()
    both = [json.loads((tmp_path / f"two{i}").read_text()) for i in range(2)]
    assert [found.pop("processes") for found in both] == [2, 2]
    for name, numbers in both[0].items():
        one = hk.loss_landscape(
            case.model, hk.cross_entropy(), case.batches, directions=name, steps=5
        )
        assert one.curvatures is not None
        expected = [*one.values.tolist(), one.center, one.axes[0].slope, *one.curvatures[0]]
        # Eigenvectors are good to 1e-4 in either run; sums in another order differ by rounding.
        assert numbers == pytest.approx(expected, rel=1e-9, abs=1e-10), name
        assert both[1][name] == numbers


def test_the_example_of_the_page_runs_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "landscape.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(example, found)
    assert {p.name for p in tmp_path.iterdir()} == {"landscape.png", "line.svg"}
    plane, line = found["plane"], found["line"]
    assert plane.curvatures[0][0] == pytest.approx(plane.axes[0].eigenvalue, rel=1e-4)
    assert line.axes[0].normalization == "filter"
