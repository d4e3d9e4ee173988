"""What `hawqkit check` foresees of tuning."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import command_line
import pico
import pytest
import torch
from command_line import contents, folders, refuse, sets, succeed
from tuning_cases import ranges_of, small_data, small_model

from hawqkit.tuning import training
from hawqkit.tuning.rehearsing import MIXES, rehearse_tuning
from hawqkit.tuning.settings import Distillation, TuneSettings

TUNE = "tune={sequences: 8, steps: 40, batch: 4, distillation: {}}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pico.save(tmp_path / "model", pico.llama())
    (tmp_path / "r.yaml").write_text(command_line.RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HAWQKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_check_says_what_tuning_takes_and_writes_nothing(here: Path) -> None:
    before, places = contents(here), folders(here)
    shown = " ".join(succeed("check", "r.yaml", *sets(TUNE)).output.split())
    assert "for 40 steps, peak memory" in shown
    assert "an estimate by two steps with layers in int8-g32" in shown
    assert "tune " in shown.partition("predicted time")[2]
    assert (contents(here), folders(here)) == (before, places)
    assert "an estimate" not in succeed("check", "r.yaml").output
    refuse(here, "check", "r.yaml", *sets("tune={sequences: 100000}"), words="tune: ")


@pytest.mark.parametrize("batch_norm", ["frozen", "re-estimated"])
def test_seconds_are_those_of_all_that_is_done(
    monkeypatch: pytest.MonkeyPatch, batch_norm: str
) -> None:
    """With a clock that goes on by a second a look, everything takes one second."""
    clock = itertools.count()
    monkeypatch.setattr(training.time, "perf_counter", lambda: float(next(clock)))
    model, data = small_model(steps=2), small_data(48, withheld=8)
    before = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    settings = TuneSettings(
        epochs=2.5, batch=16, learned_scales="both", start="lsq",
        distillation=Distillation(), batch_norm=batch_norm,
    )  # fmt: skip
    texts = {"held-out": small_data(1024, seed=5), "other": small_data(512, seed=6)}
    found = rehearse_tuning(
        model, model.layers, ["int2-channel", "w3a4", "none"], data, settings,
        rounding="nearest", activations=ranges_of(model, data, 4), held_out=texts,
    )  # fmt: skip
    assert found.formats == ("w3a4",)
    # 40 examples train, 2.5 epochs of them in batches of 16: 100 / 16 steps, rounded up. Epochs end
    # in steps 3 and 5, and the last is the 7th; batch norms are looked at before the first too.
    assert (found.steps, found.settles, found.watches) == (7, 4, 8)
    assert (found.step_seconds, found.settle_seconds, found.watch_seconds) == (1.0, 1.0, 1.0)
    # 1,536 examples in the end, of which 1,024 are watched along the way.
    assert found.compare_seconds == pytest.approx(MIXES * 1.5)
    assert found.seconds == pytest.approx(7 + 4 + 8 + MIXES * 1.5)
    after = model.module.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(p.requires_grad and p.grad is not None for p in model.module.parameters())
    assert not any(module._forward_pre_hooks for module in model.module.modules())


def test_without_held_out_data_only_steps_count() -> None:
    model, data = small_model(steps=2), small_data(40)
    found = rehearse_tuning(
        model, model.layers, ["int4-channel"], data,
        replace(TuneSettings(), steps=5, batch=8), rounding="nearest",
    )  # fmt: skip
    assert found.compare_seconds == 0
    assert found.step_seconds > 0
    assert found.seconds >= 5 * found.step_seconds
