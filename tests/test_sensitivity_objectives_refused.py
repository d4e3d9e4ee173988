"""Losses and targets that the probe refuses, each with what to do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from objective_cases import CASES, FORMATS, case, mine, numbers, outputs, spread

import hawqkit as hk
from hawqkit.curvature.output_roots import output_root
from hawqkit.errors import InputError, StateMismatch, Unsupported


def test_a_journal_of_another_loss_is_refused_and_ones_own_goes_on(tmp_path: Any) -> None:
    net, data, objective = case("Huber", 6)
    model = hk.wrap_model(net, name="net")
    first = hk.probe(model, data, FORMATS, objective=objective, folder=tmp_path)
    again = hk.probe(model, data, FORMATS, objective=objective, folder=tmp_path)
    assert again.scores == first.scores
    with pytest.raises(StateMismatch, match='objective: there "Huber", now "squared error"'):
        hk.probe(model, data, FORMATS, objective=hk.squared_error(), folder=tmp_path)


def test_losses_without_a_root_are_refused_with_what_to_do() -> None:
    net, data, _ = case("squared error", 4)
    model = hk.wrap_model(net, name="net")

    def refused(loss: Any, kind: type[Exception], match: str, **more: Any) -> None:
        with pytest.raises(kind, match=match):
            hk.probe(model, data, FORMATS, objective=mine("odd", loss, **more))

    wave = lambda z, y: (3 * (z - y)).sin().sum()  # noqa: E731
    refused(wave, Unsupported, r"not positive semi-definite: .* % of its blocks")
    refused(lambda z, y: (z - y).abs().sum(), Unsupported, "zero everywhere")
    refused(lambda z, y: (z - y).square().mean(), InputError, "must return the sum over examples")
    refused(
        lambda z, y: (z - z.mean(0)).square().sum(), InputError, "must return the sum over examples"
    )
    refused(
        lambda z, y: z.square().sum(),
        InputError,
        "root returned the shape",
        root=lambda z, b, x: x[0],
    )
    refused(
        lambda z, y: z.square().sum(),
        InputError,
        "curvature returned",
        curvature=lambda z, b, U: U[0],
    )
    with pytest.raises(InputError, match="must be a whole number"):
        hk.probe(
            model, data, FORMATS,
            objective=hk.Objective(outputs, lambda z, b: (z.square().sum(), len(z) / 2)),
        )  # fmt: skip
    with pytest.raises(InputError, match="counts no prediction"):
        hk.probe(
            model, data, FORMATS,
            objective=hk.Objective(outputs, lambda z, b: (z.square().sum(), 0)),
        )  # fmt: skip


def test_what_is_too_large_for_dense_blocks_is_refused() -> None:
    z = numbers(1, 2, 600)
    batch = hk.make_examples(np.zeros((1, 1)), targets=z).micro_batch([0])
    with pytest.raises(
        Unsupported, match=r"1,200 numbers, depend on each other .*Objective\(root="
    ):
        output_root(mine("coupled", spread), z, batch, torch.ones_like(z))


def test_examples_that_are_coupled_in_the_second_derivative_are_refused() -> None:
    z = numbers(2, 3)
    batch = hk.make_examples(np.zeros((2, 1)), targets=z).micro_batch([0, 1])
    coupled = mine("coupled", lambda z, y: z.sum(0).square().sum() / 2)
    with pytest.raises(InputError, match="depends on the outputs of another"):
        output_root(coupled, z, batch, torch.ones_like(z))


def test_a_missing_or_unfitting_loss_is_refused_with_what_to_do() -> None:
    net, data, objective = case("squared error", 12)
    model = hk.wrap_model(net, name="net")
    with pytest.raises(InputError, match=r"the loss must be given.*squared_error\(\)"):
        hk.probe(model, data, FORMATS)
    with pytest.raises(InputError, match="would be of the cross-entropy"):
        hk.probe(model, data, FORMATS, objective=objective, also=["hessian-trace"])
    with pytest.raises(InputError, match="floating targets"):
        hk.probe(model, data, FORMATS, objective=hk.cross_entropy())
    with pytest.raises(InputError, match="no classes"):
        _ = data.micro_batch([0]).targets
    found = hk.probe(model, data, FORMATS, objective=objective)
    chosen = hk.allocate(found, average_bits=3, draws=0)
    with pytest.raises(InputError, match="increases of squared error; held-out has targets"):
        hk.validate(model, chosen, data)
    with pytest.raises(InputError, match="measure_loss: the objective is Huber"):
        hk.measure_loss(model, chosen, data, CASES["Huber"][3])


def test_targets_and_labels_do_not_go_together() -> None:
    x = np.zeros((4, 3))
    with pytest.raises(InputError, match="neither labels nor targets"):
        hk.make_examples(x)
    with pytest.raises(InputError, match="not both"):
        hk.make_examples(x, [0, 1, 0, 1], targets=x)
    with pytest.raises(InputError, match="beside 3 targets"):
        hk.make_examples(x, targets=np.zeros((3, 2)))
    with pytest.raises(InputError, match="classes and names are of labels"):
        hk.make_examples(x, targets=x, classes=2)
