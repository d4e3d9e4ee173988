"""All layers on one graph: traces against dense blocks, and operators that share their graphs."""

from __future__ import annotations

import math

import curvature_oracles as oracles
import numpy as np
import pico
import pytest
import torch
from curvature_oracles import Case, relative
from torch import Tensor, nn

from hawqkit.curvature import layer_traces as traces
from hawqkit.curvature.data import Batches
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.layer_probes import HessianProbes, Task
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.layers import choose_layers, layer_operators
from hawqkit.curvature.objective import Objective, cross_entropy
from hawqkit.errors import InputError
from hawqkit.models.model import wrap_model


def true_traces(case: Case, matrix: Tensor) -> dict[str, float]:
    places = oracles.places(case)
    return {
        layer: float(sum(matrix[places[n], places[n]].trace() for n in names))
        for layer, names in choose_layers(case.model).items()
        if all(n in places for n in names)
    }


@pytest.mark.parametrize("kind", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "gpt2"])
def test_traces_are_those_of_the_dense_blocks(name: str, kind: str) -> None:
    case = {"mlp": oracles.mlp, "cnn": oracles.cnn, "gpt2": oracles.language}[name]()
    dense = oracles.dense_hessian if kind == "hessian" else oracles.dense_gauss_newton
    truth = true_traces(case, dense(case))
    found = layer_traces(
        case.model,
        cross_entropy(),
        case.batches,
        layers=list(truth),
        relative_error=0.05,
        max_probes=256,
        kind=kind,
    )
    assert list(found) == list(truth)
    for layer, estimate in found.items():
        assert abs(estimate.value - truth[layer]) <= 4 * estimate.stderr, layer
        assert estimate.relative_error <= 0.05 or "max_probes" in estimate.note
        assert estimate.interval is not None


def test_only_the_products_of_a_layer_are_random_not_the_data() -> None:
    """With all sign vectors as probes the mean is exact, so batches must share each probe."""
    x = oracles.noise(9, 2, seed=1)
    y = torch.arange(9) % 2
    model = oracles.filled(nn.Linear(2, 2, bias=False).double())
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    whole = hessian(model, cross_entropy(), [(x, y)]).dense()
    forms = {
        round(float(v @ whole @ v), 9)
        for v in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 4)
    }
    samples = _samples(model, batches, 24)
    assert {round(s, 9) for s in samples} <= forms
    assert len(forms) < 9


def _samples(model: nn.Module, batches: list[tuple[Tensor, Tensor]], count: int) -> list[float]:
    problem, layers = traces._prepare(model, cross_entropy(), None, None)
    probes = HessianProbes(problem, Batches(batches), 0)
    samples = []
    for number in range(0, count, 2):  # of two samples the mean and the spread tell both
        probes.run([Task(layers[0], number, 2)])
        _, mean, variance, _ = layers[0].passes[-1]
        samples += [mean - math.sqrt(variance), mean + math.sqrt(variance)]
    return samples


def test_intervals_cover_at_a_fixed_number_of_probes() -> None:
    case = oracles.mlp()
    truth = true_traces(case, oracles.dense_hessian(case))
    covered = [
        found[layer].interval[0] <= truth[layer] <= found[layer].interval[1]
        for seed in range(150)
        for found in [
            layer_traces(
                case.model,
                cross_entropy(),
                case.batches,
                relative_error=1e-9,
                max_probes=16,
                seed=seed,
            )
        ]
        for layer in truth
    ]
    # 300 of them: three standard errors of a share of 0.95 are 0.038.
    assert np.mean(covered) >= 0.95 - 0.038


def test_a_piecewise_linear_network_has_equal_traces_of_both_kinds() -> None:
    """Second derivatives of each output by one layer are zero, so tr(H_l) = tr(G_l) exactly."""
    case = oracles.cnn(relu=True)
    H, G = oracles.dense_hessian(case), oracles.dense_gauss_newton(case)
    by_hessian = true_traces(case, H)
    assert by_hessian == pytest.approx(true_traces(case, G), rel=1e-9)
    found = {
        kind: layer_traces(case.model, cross_entropy(), case.batches, kind=kind, seed=1)
        for kind in ("hessian", "gauss-newton")
    }
    for layer, truth in by_hessian.items():
        a, b = found["hessian"][layer], found["gauss-newton"][layer]
        assert abs(a.value - b.value) <= 3 * float(np.hypot(a.stderr, b.stderr))
        assert abs(b.value - truth) <= 3 * b.stderr


def test_gauss_newton_traces_where_labels_cannot_be_drawn() -> None:
    case = oracles.mlp()
    truth = true_traces(case, oracles.dense_gauss_newton(case))
    own = Objective(cross_entropy().outputs, cross_entropy().loss)
    found = layer_traces(case.model, own, case.batches, kind="gauss-newton")
    for layer, estimate in found.items():
        assert estimate.method == "hutchinson"
        assert abs(estimate.value - truth[layer]) <= 4 * estimate.stderr


def test_a_network_that_is_sure_of_itself_is_not_measured_by_rare_labels() -> None:
    case = (
        oracles.cnn()
    )  # its least likely labels have 1e-6 of the probability and all of the trace
    z, _ = oracles.jacobian(case)
    assert float(torch.softmax(z, -1).max(1).values.min()) > 0.99
    truth = true_traces(case, oracles.dense_gauss_newton(case))
    found = layer_traces(case.model, cross_entropy(), case.batches, kind="gauss-newton", seed=5)
    for layer, estimate in found.items():
        assert abs(estimate.value / truth[layer] - 1) < 0.25


def test_probes_depend_on_seed_and_layer_alone() -> None:
    case = oracles.mlp()
    whole = layer_traces(case.model, cross_entropy(), case.batches, max_probes=16)
    alone = layer_traces(case.model, cross_entropy(), case.batches, layers=["2"], max_probes=16)
    one = layer_traces(
        case.model,
        cross_entropy(),
        [tuple(torch.cat(part) for part in zip(*case.batches, strict=True))],
        max_probes=16,
        memory_bytes=1,
    )
    other = layer_traces(case.model, cross_entropy(), case.batches, max_probes=16, seed=1)
    assert alone["2"].value == pytest.approx(whole["2"].value, rel=1e-12)
    assert one["2"].value == pytest.approx(whole["2"].value, rel=1e-12)
    assert abs(other["2"].value / whole["2"].value - 1) > 1e-6


def test_layers_of_a_loaded_model_and_of_sequences() -> None:
    module = pico.llama(layers=1, hidden=16, intermediate=16, tied=True).double()
    model = wrap_model(module, name="pico")
    data = pico.sequences(4, 8, ragged=True, withheld=1)
    names = choose_layers(model)
    assert "model.embed_tokens" in names  # the tied matrix is one layer
    assert "lm_head" not in names
    ops = layer_operators(model, cross_entropy(), data, kind="gauss-newton")
    dictionaries = []
    for i in range(3):  # without the sequence that is withheld
        length = int(data.attention[i].sum())
        dictionaries.append({"input_ids": data.tokens[i : i + 1, :length]})
    layer = "model.layers.0.mlp.up_proj"
    v = oracles.noise(ops[layer].size, seed=1)
    by_hand = gauss_newton(module, cross_entropy(), dictionaries, parameters=[layer])
    assert relative(ops[layer].matvec(v), by_hand.matvec(v)) <= 1e-6
    assert not any(p.requires_grad for p in module.parameters())


def test_operators_of_layers_share_one_graph() -> None:
    case = oracles.mlp()
    calls = []
    case.model.register_forward_hook(lambda *_: calls.append(1))
    H = oracles.dense_hessian(case)
    calls.clear()
    ops = layer_operators(case.model, cross_entropy(), case.batches)
    places = oracles.places(case)
    for layer, op in ops.items():
        place = places[f"{layer}.weight"]
        assert relative(op.dense(), H[place, place]) <= 1e-10
    many = len(calls)
    for op in ops.values():
        op.matvec(torch.ones(op.size))
    assert len(calls) == many  # not one forward pass more


def test_groups_of_ones_own_and_names_that_do_not_exist() -> None:
    case = oracles.mlp()
    groups = choose_layers(case.model, {"first": ["0"], "last": ["2.weight"]})
    assert groups == {"first": ("0.weight", "0.bias"), "last": ("2.weight",)}
    with pytest.raises(InputError, match="belongs to one layer"):
        choose_layers(case.model, {"a": ["0"], "b": ["0.bias"]})
    with pytest.raises(InputError, match="matches none of the 2 layers"):
        choose_layers(case.model, ["1"])
    with pytest.raises(InputError, match="no parameter of two dimensions"):
        choose_layers(nn.LayerNorm(3).eval())
    with pytest.raises(InputError, match="above 0"):
        layer_traces(case.model, cross_entropy(), case.batches, relative_error=0)
    with pytest.raises(InputError, match="2 or more"):
        layer_traces(case.model, cross_entropy(), case.batches, max_probes=1)
