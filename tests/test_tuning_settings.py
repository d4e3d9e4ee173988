"""The parts of tuning that stand alone: order, schedules, losses, optimizer, batch norms."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from tuning_cases import small_data, small_model, uniform

import hawqkit as hk
from hawqkit.errors import InputError
from hawqkit.tuning.batch_norms import re_estimate
from hawqkit.tuning.losses import summed_loss
from hawqkit.tuning.order import Order
from hawqkit.tuning.settings import Distillation, TuneSettings, rate
from hawqkit.tuning.training import make_optimizer

FAST = TuneSettings(epochs=4, batch=16, learning_rate=3e-3)


def test_every_epoch_shows_every_example_once_and_seeds_differ() -> None:
    order = Order(range(100, 110), batch=4, seed=1)
    stream = [row for step in range(5) for row in order(step)]
    assert sorted(stream[:10]) == sorted(stream[10:]) == list(range(100, 110))
    assert stream[:10] != stream[10:]
    assert [order.ends_epoch(step) for step in range(5)] == [False, False, True, False, True]
    firsts = {tuple(Order(range(10), batch=10, seed=s)(e)) for s in range(3) for e in range(3)}
    assert len(firsts) == 9


@pytest.mark.parametrize("warmup", [None, 0.25])
def test_the_one_cycle_is_torchs(warmup: float | None) -> None:
    settings = TuneSettings(schedule="one-cycle", learning_rate=0.2, warmup=warmup)
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total_steps=40, pct_start=warmup or 0.3, cycle_momentum=False
    )
    for step in range(40):
        assert rate(settings, step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < 39:
            schedule.step()


def test_the_cosine_after_warmup_is_torchs() -> None:
    settings = TuneSettings(schedule="cosine", learning_rate=0.2, warmup=0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=36)
    assert [rate(settings, k, 40) for k in range(4)] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    for step in range(4, 40):
        assert rate(settings, step, 40) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        schedule.step()
    constant = TuneSettings(schedule="constant", learning_rate=0.2, warmup=0.1)
    assert [rate(constant, k, 40) for k in (0, 3, 4, 39)] == pytest.approx([0.05, 0.2, 0.2, 0.2])


def test_the_loss_is_its_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in "ab")
    labels = torch.randint(7, (5,), generator=generator)

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    z, t = logits.numpy(), taught.numpy()
    ce = -np.log(softmax(z)[np.arange(5), labels.numpy()]).sum()
    p, q = softmax(t / 3), softmax(z / 3)
    kl = (p * np.log(p / q)).sum()
    assert float(summed_loss(logits, labels, None, None)) == pytest.approx(ce)
    for alpha in (0.25, 1.0):
        found = summed_loss(logits, labels, taught, Distillation(alpha, 3.0))
        assert float(found) == pytest.approx((1 - alpha) * ce + alpha * 9 * kl)


def test_settings_are_refused_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        TuneSettings(
            epochs=0, batch=0, optimizer="adam", schedule="cosin", warmup=1.0,
            distillation=Distillation(0.0, -1.0),
        )  # fmt: skip
    message = str(caught.value)
    assert len(message.splitlines()) == 7
    assert "Did you mean 'adamw'?" in message
    assert "Did you mean 'cosine'?" in message


def test_decay_falls_on_matrices_alone() -> None:
    model = small_model(steps=1)
    named = {f"parameter/{n}": p for n, p in model.module.named_parameters()}
    named["scale/conv1"] = nn.Parameter(torch.ones(8, 1))
    optimizer = make_optimizer(named, TuneSettings(weight_decay=0.1))
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert sorted(p.ndim for p in decayed["params"]) == [2, 4, 4]
    assert any(p is named["scale/conv1"] for p in free["params"])


def test_re_estimated_statistics_are_those_of_the_rounded_network() -> None:
    model, data = small_model(), small_data(128)
    settings = replace(FAST, batch_norm="re-estimated")
    tuned = hk.tune(model, uniform(model, "int3-channel"), data, settings=settings)
    module = tuned.model.module
    (images,) = data.inputs.values()
    with torch.no_grad():
        first = module.conv1(images).double().transpose(0, 1).flatten(1)
    np.testing.assert_allclose(module.norm1.running_mean, first.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(module.norm1.running_var, first.var(1), rtol=1e-4)
    assert not torch.equal(module.norm1.running_mean, model.module.norm1.running_mean)


def test_batch_norms_are_left_as_they_were_but_for_statistics() -> None:
    model, data = small_model(), small_data(130)
    norm = model.module.norm2
    momentum, tracked = norm.momentum, norm.num_batches_tracked.clone()
    assert re_estimate(model.module, data, range(130), torch.device("cpu")) == 128
    assert (norm.momentum, norm.training) == (momentum, False)
    assert torch.equal(norm.num_batches_tracked, tracked)
    assert not norm._forward_pre_hooks
    few = re_estimate(model.module, data, range(5), torch.device("cpu"))
    assert (few, re_estimate(model.module, data, [0], torch.device("cpu"))) == (5, 0)
