"""The probe of any loss, against dense float64 Gauss-Newton matrices and closed forms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pico
import pytest
import torch
from objective_cases import (
    CASES,
    DRAWS,
    FORMATS,
    NEAREST,
    case,
    conv_net,
    dense,
    loss_of,
    mine,
    mlp,
    numbers,
    poisson,
    repeated,
    smoothed,
)
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional

import hawqkit as hk
from hawqkit.curvature.output_roots import output_root
from hawqkit.quantize.apply import applied
from hawqkit.records import Sensitivities, to_array
from hawqkit.report.html import render_report
from hawqkit.report.tables import print_summary
from hawqkit.sensitivity.probing import Prober, ProbeSettings
from hawqkit.store import read_record, write_record


def rounding_error(model: Any, name: str, format: str) -> Tensor:
    before = model.weight(name).clone()
    with applied(model, {name: format}, rounding="nearest"):
        return model.weight(name) - before


@pytest.mark.parametrize("name", CASES)
def test_trace_and_quadratic_forms_are_those_of_the_dense_matrix(name: str) -> None:
    net, data, objective = case(name)
    model = hk.wrap_model(net, name="net")
    found = hk.probe(model, repeated(data, DRAWS), FORMATS, objective=objective, settings=NEAREST)
    x, y = data.inputs["(first)"], data.labels
    counted = int(objective.loss(net(x), data.micro_batch(range(3)))[1])
    assert int(found.samples.count.sum()) == DRAWS * counted
    directional = to_array(found.scores["directional"].values)
    stderr = to_array(found.scores["directional"].stderr)
    for row, layer in enumerate(found.layers):
        G = dense(net, layer.name, x, y, loss_of(name), counted)
        wanted = [float(G.trace())]
        got = [(found.trace[row], found.trace_stderr[row])]
        for column, format in enumerate(FORMATS):
            error = rounding_error(model, layer.name, format).flatten()
            wanted.append(float(error @ G @ error) / 2)
            got.append((directional[row, column], stderr[row, column]))
        for want, (value, error) in zip(wanted, got, strict=True):
            assert error < 0.2 * want  # so that the next line says something
            assert abs(value - want) < 4 * error


@pytest.mark.parametrize("name", CASES)
def test_the_root_is_that_of_the_dense_second_derivative(name: str) -> None:
    net, data, objective = case(name)
    z, batch = net(data.inputs["(first)"]).detach(), data.micro_batch(range(3))
    units = torch.eye(z.numel(), dtype=torch.float64)
    R = torch.stack([output_root(objective, z, batch, x.reshape(z.shape)).flatten() for x in units])
    loss, shape = loss_of(name), z.shape
    wanted = torch.autograd.functional.hessian(
        lambda v: loss(v.reshape(shape), data.labels), z.flatten()
    )
    torch.testing.assert_close(R.T @ R, wanted, rtol=1e-9, atol=1e-10)


def test_curvature_alone_gives_the_root_that_the_loss_gives() -> None:
    net, data, objective = case("soft labels")
    z, batch = net(data.inputs["(first)"]).detach(), data.micro_batch(range(3))

    def curvature(z: Tensor, batch: Any, U: Tensor) -> Tensor:
        p = z.softmax(-1)
        return p * U - p * (p * U).sum(-1, keepdim=True)

    given = mine("soft labels", smoothed, curvature=curvature)
    x = torch.where(numbers(*z.shape, seed=9) < 0, -1.0, 1.0).double()
    found, wanted = (output_root(o, z, batch, x) for o in (given, objective))
    # An eigenvalue of zero comes out as 1e-17, and its square root is known to no better than 1e-8.
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=2e-8)


def test_a_root_of_ones_own_is_used() -> None:
    net, data, _ = case("squared error")
    doubled = mine("doubled", loss_of("squared error"), root=lambda z, b, x: 2 * x)
    model = hk.wrap_model(net, name="net")
    once = hk.probe(model, data, FORMATS, objective=mine("one", loss_of("squared error")))
    twice = hk.probe(model, data, FORMATS, objective=doubled)
    np.testing.assert_allclose(twice.trace, 4 * np.array(once.trace), rtol=1e-12)


def test_sure_predictions_in_float32_have_a_root() -> None:
    """p - p^2 of them is rounding alone: neither coupled nor negative."""
    z = torch.tensor([[40.0, 0.0, -3.0], [90.0, 1.0, 2.0]])
    batch = hk.make_examples(np.zeros((2, 1)), targets=z).micro_batch([0, 1])
    for rows in ([0, 1], [1]):
        some = hk.make_examples(np.zeros((len(rows), 1)), targets=z[rows]).micro_batch(
            range(len(rows))
        )
        r = output_root(mine("soft labels", smoothed), z[rows], some, torch.ones(len(rows), 3))
        assert float(r.abs().max()) < 1e-6
    assert batch.labels.dtype == torch.float32


def test_a_loss_that_cannot_be_mixed_with_float64_is_taken_in_float32() -> None:
    weights = torch.tensor([1.0, 2.0, 3.0])

    def weighted(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z, y, weight=weights, reduction="sum")

    z, y = numbers(4, 3).float(), torch.tensor([0, 1, 2, 1])
    batch = hk.make_examples(np.zeros((4, 1)), targets=y).micro_batch(range(4))
    x = torch.ones(4, 3)
    r = output_root(mine("weighted", weighted), z, batch, x).double()
    p = z.double().softmax(-1)
    for row in range(4):  # the root of c (diag p - p p') is symmetric
        H = weights[y[row]].double() * (p[row].diag() - torch.outer(p[row], p[row]))
        values, vectors = torch.linalg.eigh(H)
        wanted = vectors @ (values.clamp(min=0).sqrt() * (vectors.T @ x[row].double()))
        torch.testing.assert_close(r[row], wanted, rtol=1e-4, atol=1e-4)


def test_of_a_linear_model_the_measured_increase_is_the_quadratic_form() -> None:
    net = nn.Linear(4, 2, bias=False).double()
    pico.fill(net, 5)
    x = numbers(50, 4, seed=6)
    with torch.no_grad():
        y = net(x)  # no residual: the increase has no linear part
    model = hk.wrap_model(nn.Sequential(net), name="linear")
    objective = hk.squared_error()
    data = hk.make_examples(x, targets=y, withheld=25)
    found = hk.probe(model, data, FORMATS, objective=objective)
    chosen = hk.allocate(found, average_bits=2.0, draws=0, baselines=["uniform"])
    measured = hk.measure_loss(model, chosen, data, objective)
    error = rounding_error_of(model, chosen.layers)
    wanted = float((x @ error.T).square().sum()) / 2 / 50
    assert measured.original == 0.0
    assert measured.chosen.increase == pytest.approx(wanted, rel=1e-12)
    assert measured.chosen.curved == pytest.approx(wanted, rel=1e-12)
    assert [m.name for m in measured.mixes] == ["chosen", "uniform"]
    predicted = measured.chosen.prediction
    assert predicted is not None
    assert abs(predicted.kl - wanted) < 4 * predicted.kl_stderr


def rounding_error_of(model: Any, mix: dict[str, str]) -> Tensor:
    (name,) = mix
    before = model.weight(name).clone()
    with applied(model, mix):
        return model.weight(name) - before


def test_measured_increases_are_plain_differences_of_the_loss() -> None:
    net, data, objective = case("Poisson", 24)
    model = hk.wrap_model(net, name="net")
    found = hk.probe(model, data, FORMATS, objective=objective)
    chosen = hk.allocate(found, average_bits=2.5, draws=0, baselines=["uniform"])
    measured = hk.measure_loss(model, chosen, data, objective, batch=5)
    x, y = data.inputs["(first)"], data.labels
    for mix, layers in zip(
        measured.mixes, (chosen.layers, chosen.baselines[0].layers), strict=True
    ):
        with torch.no_grad():
            z = net(x)
            with applied(model, layers):
                changed = net(x)
        increase = (poisson(changed, y) - poisson(z, y)) / 24
        linear = ((z.exp() - y) * (changed - z)).sum() / 24
        assert mix.increase == pytest.approx(float(increase), rel=1e-9)
        assert mix.curved == pytest.approx(float(increase - linear), rel=1e-9)
    assert measured.chosen.difference == 0.0


def test_of_the_cross_entropy_the_curved_part_is_the_kl_divergence() -> None:
    net = mlp()
    model = hk.wrap_model(net, name="net")
    x, y = numbers(60, 4, seed=8), torch.arange(60) % 3
    data = hk.make_examples(x, y, withheld=20)
    found = hk.probe(model, data, FORMATS, objective=hk.cross_entropy())
    chosen = hk.allocate(found, average_bits=2.5, draws=0, baselines=["uniform"])
    validation = hk.validate(model, chosen, data)
    measured = hk.measure_loss(model, chosen, data, hk.cross_entropy())
    for mix, one in zip(validation.mixes, measured.mixes, strict=True):
        assert one.curved == pytest.approx(mix.measured["held-out"].kl, rel=1e-6)
        assert one.loss == pytest.approx(mix.measured["held-out"].loss, rel=1e-6)


def same(first: Sensitivities, second: Sensitivities) -> None:
    for name in first.scores:
        np.testing.assert_allclose(
            to_array(first.scores[name].values), to_array(second.scores[name].values), rtol=1e-12
        )


def test_a_classifiers_cross_entropy_by_name_gives_the_numbers_of_the_default() -> None:
    model = hk.wrap_model(mlp(), name="net")
    data = hk.make_examples(numbers(9, 4), torch.arange(9) % 3)
    default = hk.probe(model, data, FORMATS)
    named = hk.probe(model, data, FORMATS, objective=hk.cross_entropy())
    same(named, default)
    assert default.loss == named.loss == "cross-entropy"
    assert default.fingerprint != named.fingerprint
    assert "objective" not in Prober(model, data, FORMATS, ProbeSettings()).facts


def test_a_language_models_cross_entropy_by_name_agrees_with_drawn_labels() -> None:
    model = hk.wrap_model(pico.gpt2(dtype=torch.float64), name="pico")
    text = pico.sequences(24, 10, ragged=True)
    default = hk.probe(model, text, ["int4-channel"])
    named = hk.probe(model, text, ["int4-channel"], objective=hk.cross_entropy())
    assert named.samples.count.tolist() == default.samples.count.tolist()
    for row in range(len(model.layers)):
        error = np.hypot(named.trace_stderr[row], default.trace_stderr[row])
        assert abs(named.trace[row] - default.trace[row]) < 4 * error


def test_signs_and_numbers_depend_on_the_example_and_not_on_its_batch() -> None:
    net, data, objective = case("soft labels", 7)
    model = hk.wrap_model(net, name="net")
    parts = [
        hk.probe(model, data, FORMATS, objective=objective, settings=ProbeSettings(batch=b))
        for b in (2, 7)
    ]
    for name in ("squared_gradient", "directional", "token", "count"):
        one, other = (getattr(p.samples, name) for p in parts)
        np.testing.assert_allclose(one, other, rtol=1e-9)


def test_pictures_with_rounded_inputs_are_measured() -> None:
    net, data, objective = case("squared error of pictures", 12)
    model = hk.with_operations(hk.wrap_model(net, name="net"), data)
    found = hk.probe(model, data, ["int4-channel-a4", "int8-channel-a8"], objective=objective)
    values = to_array(found.scores["directional"].values)
    assert (values[:, 0] > 4 * values[:, 1]).all()
    assert hk.allocate(found, average_bits=6, draws=0).loss == "squared error"


def test_the_name_of_the_loss_is_kept_and_shown(tmp_path: Any) -> None:
    net, data, objective = case("Poisson", 24)
    found = hk.probe(hk.wrap_model(net, name="net"), data, FORMATS, objective=objective)
    chosen = hk.allocate(found, average_bits=3, draws=0)
    write_record(tmp_path / "s.json", found)
    assert read_record(tmp_path / "s.json", Sensitivities).loss == "Poisson"
    console = Console(record=True, width=100)
    print_summary(console, found, chosen)
    for text in (console.export_text(), render_report(found, chosen)):
        assert "The loss of this probe is Poisson." in " ".join(text.split())
        assert "0 classes" not in text


def test_classes_of_pixels_are_targets_of_the_cross_entropy() -> None:
    net = conv_net()
    data = hk.make_examples(
        numbers(6, 1, 4, 4), targets=(numbers(6, 4, 4, seed=3) > 0).to(torch.int64)
    )
    model = hk.wrap_model(net, name="net")
    found = hk.probe(
        model, repeated(data, DRAWS // 4), FORMATS, objective=hk.cross_entropy(), settings=NEAREST
    )
    assert int(found.samples.count[0]) == 16

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return functional.cross_entropy(z, y, reduction="sum")

    for row, layer in enumerate(found.layers):
        G = dense(net, layer.name, data.inputs["(first)"], data.labels, loss, 6 * 16)
        assert abs(found.trace[row] - float(G.trace())) < 4 * found.trace_stderr[row]
