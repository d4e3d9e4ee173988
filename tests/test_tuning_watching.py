"""Held-out losses along a tuning run: what they are, and that a killed run has the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pico
import pytest
import torch
from torch.nn.functional import cross_entropy
from tuning_cases import allocation_of, small_data, small_model, uniform

import hawqkit as hk
from hawqkit.models.examples import Examples
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.apply import applied
from hawqkit.store import read_arrays, write_arrays
from hawqkit.tuning.settings import Distillation, TuneSettings
from hawqkit.tuning.watching import MOST, TOKENS, watched_rows, watched_steps

SETTINGS = TuneSettings(steps=13, batch=16, learning_rate=3e-3, checkpoint_every=3)


class Stopped(Exception):
    pass


def outcome(model: LoadedModel, data: Examples) -> tuple[np.ndarray, np.ndarray]:
    """Return loss and rightness of each example, by plain torch."""
    (images,) = data.inputs.values()
    with torch.no_grad():
        logits = model.module(images)
    losses = cross_entropy(logits, data.labels, reduction="none")
    return losses.double().numpy(), (logits.argmax(-1) == data.labels).double().numpy()


def test_losses_begin_with_the_mix_before_tuning_and_end_with_the_tuned_network() -> None:
    model, data, held_out = small_model(), small_data(64), small_data(50, seed=5)
    allocation = allocation_of(model, uniform(model, "int3-channel"))
    for batch_norm in ("frozen", "re-estimated"):
        settings = replace(SETTINGS, batch_norm=batch_norm)
        tuned = hk.tune(model, allocation, data, settings=settings, held_out={"held-out": held_out})
        points = tuned.record.held_out
        assert [p.step for p in points] == sorted(watched_steps(13))
        assert {(p.text, p.examples) for p in points} == {("held-out", 50)}
        losses, right = outcome(tuned.model, held_out)
        assert points[-1].loss == pytest.approx(losses.mean(), rel=1e-5)
        assert points[-1].loss_stderr == pytest.approx(losses.std(ddof=1) / 50**0.5, rel=1e-5)
        assert points[-1].accuracy == pytest.approx(right.mean())
        assert points[-1].accuracy_stderr == pytest.approx(right.std(ddof=1) / 50**0.5)
        if batch_norm == "frozen":
            with applied(model, allocation.layers, rounding="searched"):
                before = outcome(model, held_out)[0]
            assert points[0].loss == pytest.approx(before.mean(), rel=1e-5)


def test_watching_changes_nothing_of_what_is_trained() -> None:
    model, data, held_out = small_model(), small_data(64), small_data(50, seed=5)
    allocation = allocation_of(model, uniform(model, "int3-channel"))
    seen = hk.tune(model, allocation, data, settings=SETTINGS, held_out={"held-out": held_out})
    alone = hk.tune(model, allocation, data, settings=SETTINGS)
    assert alone.record.held_out == ()
    assert seen.record.tuned == alone.record.tuned
    assert seen.record.curve == alone.record.curve


def test_the_curve_holds_cross_entropy_and_accuracy_of_each_batch() -> None:
    model, data = small_model(), small_data(64)
    mix, same = uniform(model, "int8-channel"), replace(SETTINGS, steps=1, batch=64)
    plain = hk.tune(model, mix, data, settings=same).record.curve
    assert plain.cross_entropy == plain.loss
    taught = hk.tune(model, mix, data, settings=replace(same, distillation=Distillation(0.5, 2.0)))
    with applied(model, mix, rounding="searched"):
        losses, right = outcome(model, data)
    for curve in (plain, taught.record.curve):
        assert curve.cross_entropy[0] == pytest.approx(losses.mean(), rel=1e-5)
        assert curve.accuracy[0] == pytest.approx(right.mean())
    assert taught.record.curve.loss[0] < 0.6 * losses.mean()


@pytest.mark.parametrize("at", [2, 7])
def test_a_stopped_run_has_the_same_losses_in_the_end(tmp_path: Path, at: int) -> None:
    def track(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
        for item in items:
            if stage == "tune" and item == at:
                raise Stopped
            yield item

    model, data = small_model(), small_data(64)
    allocation = allocation_of(model, uniform(model, "int3-channel"))
    texts = {"held-out": small_data(50, seed=5), "other": small_data(30, seed=6)}
    whole = hk.tune(model, allocation, data, settings=SETTINGS, held_out=texts)
    with pytest.raises(Stopped):
        hk.tune(
            model, allocation, data,
            settings=SETTINGS, held_out=texts, folder=tmp_path, track=track,
        )  # fmt: skip
    again = hk.tune(model, allocation, data, settings=SETTINGS, held_out=texts, folder=tmp_path)
    assert again.record == whole.record
    assert [p.text for p in again.record.held_out[:2]] == ["held-out", "other"]
    # Other data are measured anew, and the losses along the way of the old ones are not theirs.
    moved = {**texts, "other": small_data(30, seed=7)}
    later = hk.tune(model, allocation, data, settings=SETTINGS, held_out=moved, folder=tmp_path)
    assert {p.text for p in later.record.held_out} == {"held-out"}
    assert later.record.tuned == whole.record.tuned


def test_a_checkpoint_of_before_the_curve_was_whole_does_not_count(tmp_path: Path) -> None:
    model, data = small_model(), small_data(64)
    mix = uniform(model, "int3-channel")
    whole = hk.tune(model, mix, data, settings=SETTINGS, folder=tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").glob("batch-*"):
        arrays, metadata = read_arrays(path)
        del arrays["curve/accuracy"]
        del metadata["sha256"]
        write_arrays(path, arrays, metadata)
    (tmp_path / "a" / "tuning.json").unlink()
    again = hk.tune(model, mix, data, settings=SETTINGS, folder=tmp_path / "a")
    assert again.record == whole.record


def test_much_data_is_measured_on_an_even_part_of_it() -> None:
    data = small_data(3)
    many = replace(data, labels=torch.zeros(5 * MOST + 2, dtype=torch.long))
    rows = watched_rows(many)
    assert len(rows) == MOST == len(set(rows))
    assert set(np.diff(rows)) <= {5, 6}
    text = pico.sequences(40, 16)
    long = replace(text, facts=replace(text.facts, length=TOKENS // 4))
    assert watched_rows(long) == [0, 10, 20, 30]
    assert watched_rows(text) == list(range(40))


def test_a_language_model_is_watched_by_its_counted_tokens() -> None:
    llama = hk.wrap_model(pico.llama(), name="llama")
    mix = {x.name: "int3-g32" for x in llama.layers if x.kind == "linear"}
    text, held_out = pico.sequences(8, 16, ragged=True), pico.sequences(6, 12, ragged=True, seed=3)
    settings = TuneSettings(steps=2, batch=4, learning_rate=2e-3)
    tuned = hk.tune(
        llama, allocation_of(llama, mix), text, settings=settings, held_out={"h": held_out}
    )
    with torch.no_grad():
        logits = tuned.model.module(
            input_ids=held_out.tokens, attention_mask=held_out.attention.long()
        ).logits
    counted = held_out.counted[:, 1:]
    losses = cross_entropy(logits[:, :-1][counted], held_out.tokens[:, 1:][counted])
    assert tuned.record.held_out[-1].loss == pytest.approx(float(losses), rel=1e-5)
