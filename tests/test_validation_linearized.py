from __future__ import annotations

from typing import Any

import numpy as np
import pico
import pytest
import torch
from classifier_cases import network
from linearized_cases import (
    CASES,
    Wrapped,
    dense,
    divergence,
    exactness,
    fisher_form,
    leave_one_out,
    made,
    mix_of,
    parabola_by_hand,
    pictures,
    plain,
    rounded_twice,
    rows_of_six,
    weight_errors,
)
from torch import Tensor, nn

import hawqkit as hk
from hawqkit.quantize.apply import applied
from hawqkit.quantize.input_rounding import input_modules, input_quantizer
from hawqkit.validation.derivative import DISAGREEMENT
from hawqkit.validation.linearized import linearized_kl


@pytest.mark.parametrize("kind", sorted(CASES))
def test_figures_and_errors_are_those_of_the_whole_jacobian(kind: str) -> None:
    model, data, mix = made(kind)
    rows = np.flatnonzero(data.withheld.numpy()).tolist()
    found = linearized_kl(model, mix, data, batch=2, track=plain)
    batch = data.micro_batch(rows)
    z, t = dense(model, mix, batch)
    with applied(model, mix):
        changed = Wrapped(model.module)(batch)
    of = (batch.index[:, None].expand_as(batch.predicts)[batch.predicts]).numpy()

    def sums(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return np.array([values[of == row].sum() for row in rows])

    kl, exact, form = divergence(z, z + t), divergence(z, changed), fisher_form(z, t)
    bent = divergence(z, z + parabola_by_hand(model, mix, batch, z))
    count = sums(np.ones(len(z)))
    assert found.how == "forward"
    assert found.reason == ""
    assert (found.sequences, found.counted) == (len(rows), len(z))
    for name, values in {
        "kl": kl, "quadratic": form, "measured": exact, "softmax": kl - form,
        "network": exact - kl, "parabolic": bent,
    }.items():  # fmt: skip
        wanted, error = leave_one_out(sums(values), count)
        close = {"rel": exactness(kind), "abs": 1e-12 if exactness(kind) < 1e-7 else 1e-8}
        assert getattr(found, name) == pytest.approx(wanted, **close), name
        assert getattr(found, f"{name}_stderr") == pytest.approx(error, **close), name
    ratio, error = leave_one_out(sums(kl), sums(exact))
    assert found.ratio == pytest.approx(ratio, rel=exactness(kind))
    assert found.ratio_stderr == pytest.approx(error, rel=exactness(kind), abs=1e-6)
    ratio, error = leave_one_out(sums(bent), sums(exact))
    assert found.parabolic_ratio == pytest.approx(ratio, rel=exactness(kind))
    assert found.parabolic_ratio_stderr == pytest.approx(error, rel=exactness(kind), abs=1e-6)
    # Else the three would show nothing.
    assert abs(found.network) > 1e-3 * found.measured
    assert abs(found.softmax) > 1e-3 * found.measured


@pytest.mark.parametrize("kind", ["cnn", "llama", "bert"])
def test_differences_of_outputs_agree_with_forward_mode(kind: str) -> None:
    model, data, mix = made(kind)
    forward = linearized_kl(model, mix, data, batch=2, track=plain)
    difference = linearized_kl(model, mix, data, batch=2, track=plain, how="difference")
    assert difference.how == "difference"
    assert difference.measured == forward.measured
    # What the rule promises; ReLU may have a kink within a step.
    allowed = 2.1 * DISAGREEMENT
    assert difference.kl == pytest.approx(forward.kl, rel=allowed)
    assert difference.quadratic == pytest.approx(forward.quadratic, rel=allowed)
    if kind == "bert":  # smooth: truncation is some (6e-6)^2 of it
        assert difference.kl == pytest.approx(forward.kl, rel=1e-6)


def test_a_network_that_is_linear_in_its_weights_is_predicted_exactly() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 5)).double()
    pico.fill(module, 1, scale=2.0)
    model = hk.wrap_model(module, name="linear")
    mix = mix_of(model, "int3-channel")
    found = linearized_kl(model, mix, pictures(12), track=plain)
    assert found.measured > 0.01
    assert found.kl == pytest.approx(found.measured, rel=1e-12)
    assert found.ratio == pytest.approx(1, rel=1e-12)
    assert found.parabolic == pytest.approx(found.measured, rel=1e-12)
    assert found.network == pytest.approx(0, abs=1e-13)
    assert abs(found.softmax) > 1e-3 * found.kl  # the softmax alone is what second order misses


def test_logits_that_are_quadratic_in_the_weights_lie_on_the_parabola() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    pico.fill(module, 6, scale=2.0)
    model = hk.wrap_model(module.double(), name="two")
    found = linearized_kl(
        model, mix_of(model, "int3-channel"), rows_of_six(torch.float64), track=plain
    )
    assert abs(found.network) > 0.01 * found.measured
    assert found.parabolic == pytest.approx(found.measured, rel=1e-10)
    assert found.parabolic_ratio == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_rounded_inputs_enter_with_the_errors_of_the_original_model(how: str) -> None:
    model, data, mix, ranges = rounded_twice("int4-channel-a4")
    found = linearized_kl(model, mix, data, activations=ranges, track=plain, how=how)
    batch = data.micro_batch(range(4, 10))
    weights = dict.fromkeys(mix, "int4-channel")
    z, t = dense(model, weights, batch)
    weights_alone = divergence(z, z + t).mean()

    # By hand: u = tanh(W x + b) and so on, da = what the quantizer does to the original input.
    inner, last = model.module.inner, model.module.last
    layers = {layer.name: layer for layer in model.layers}

    def change(name: str, value: Tensor) -> Tensor:
        (module,) = input_modules(model.module, layers[name])
        return input_quantizer(ranges, name, module, 4)(value) - value

    x = batch.inputs(torch.device("cpu"))["(first)"]
    u = torch.tanh(inner(x))
    v = torch.tanh(inner(u))
    du = (1 - u**2) * (change("inner", x) @ inner.weight.T)
    dv = (1 - v**2) * ((du + change("inner", u)) @ inner.weight.T)
    t = t + (dv + change("last", v)) @ last.weight.T
    wanted = divergence(z, z + t).mean()
    assert abs(wanted - weights_alone) > 0.05 * wanted
    assert found.kl == pytest.approx(wanted, rel=1e-9 if how == "forward" else 1e-6)
    # The parabola, with inputs moved by a share of the same changes.
    changes = {"x": change("inner", x), "u": change("inner", u), "v": change("last", v)}
    errors = weight_errors(model, weights, "searched")

    def moved(e: float) -> Tensor:
        w, last_w = (
            layer.weight + e * errors[f"{name}.weight"]
            for name, layer in {"inner": inner, "last": last}.items()
        )
        first = torch.tanh((x + e * changes["x"]) @ w.T + inner.bias)
        second = torch.tanh((first + e * changes["u"]) @ w.T + inner.bias)
        return (second + e * changes["v"]) @ last_w.T + last.bias

    bent = 10 * moved(0.25) + 6 * moved(-0.25) - 16 * z
    assert found.parabolic == pytest.approx(divergence(z, z + bent).mean(), rel=1e-9)
    with applied(model, mix, activations=ranges):
        changed = model.module(x)
    assert found.measured == pytest.approx(divergence(z, changed).mean(), rel=1e-9)


def test_the_quadratic_form_is_what_the_joint_prediction_estimates() -> None:
    x = torch.randn(1500, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    data = hk.make_examples(x, torch.zeros(1500), classes=5, withheld=1400)
    model = hk.wrap_model(network(), name="net")
    table = hk.probe(model, data, ["int2-channel", "int8-channel"])
    allocation = hk.allocate(table, average_bits=5, baselines=(), draws=0)
    told = allocation.prediction
    assert told is not None
    found = hk.predict_linearized(model, allocation, data)
    error = np.hypot(told.joint_stderr, found.quadratic_stderr)
    assert abs(told.joint - found.quadratic) < 3.5 * error
    assert error < 0.15 * found.quadratic
