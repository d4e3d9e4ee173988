"""A killed tuning ends with the same bits as one that was left alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tuning_cases import ranges_of, small_data, small_model, uniform

import hawqkit as hk
from hawqkit.models.model import LoadedModel
from hawqkit.tuning.outcome import Tuned
from hawqkit.tuning.settings import Distillation, TuneSettings

ADAMW = TuneSettings(
    steps=14,
    batch=24,
    learning_rate=3e-3,
    schedule="one-cycle",
    weight_decay=0.01,
    clip=1.0,
    learned_scales="both",
    distillation=Distillation(),
    batch_norm="re-estimated",
    checkpoint_every=4,
)
SGD = replace(ADAMW, optimizer="sgd", schedule="cosine", learned_scales="none", batch_norm="frozen")


def tuned(settings: TuneSettings, folder: Path | None, track: Any = None) -> Tuned:
    model, data = small_model(steps=30), small_data(64)
    return hk.tune(
        model,
        uniform(model, "w3a4"),
        data,
        activations=ranges_of(model, data, 4),
        settings=settings,
        folder=folder,
        track=track,
    )


class Stopped(Exception):
    pass


def stopping_at(last: int):
    def track(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
        assert stage == "tune"
        for item in items:
            if item == last:
                raise Stopped
            yield item

    return track


def equal(one: Tuned, two: Tuned) -> bool:
    assert one.record == two.record
    assert one.activations == two.activations
    pairs = [(one.unrounded[n], two.unrounded[n]) for n in one.unrounded]
    pairs += [(s.scales, two.model.scales[n].scales) for n, s in one.model.scales.items()]
    states = [state(t.model) for t in (one, two)]
    assert list(states[0]) == list(states[1])
    pairs += list(zip(states[0].values(), states[1].values(), strict=True))
    return all(torch.equal(a, b) for a, b in pairs)


def state(model: LoadedModel) -> dict[str, torch.Tensor]:
    return model.module.state_dict()


@pytest.mark.parametrize("settings", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_run_that_stopped_between_checkpoints_goes_on_from_the_last(
    settings: TuneSettings, tmp_path: Path
) -> None:
    whole = tuned(settings, None)
    with pytest.raises(Stopped):
        tuned(settings, tmp_path, stopping_at(10))
    seen: list[int] = []

    def track(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
        for item in items:
            seen.append(item)
            yield item

    again = tuned(settings, tmp_path, track)
    assert seen == list(range(8, 14))
    assert equal(whole, again)
    assert equal(whole, hk.load_tuned(tmp_path, small_model(steps=30)))


def test_how_often_it_is_kept_changes_nothing(tmp_path: Path) -> None:
    often = tuned(replace(SGD, checkpoint_every=1), tmp_path)
    assert equal(often, tuned(SGD, None))
    assert len(list((tmp_path / "checkpoints").glob("*.safetensors"))) == 2
    assert tuned(SGD, tmp_path).taken


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        tuned(SGD, tmp_path, stopping_at(10))
    newest = max((tmp_path / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    starts: list[int] = []

    def track(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
        for item in items:
            starts.append(item)
            yield item

    assert equal(tuned(SGD, tmp_path, track), tuned(SGD, None))
    assert starts[0] == 4


def slowly(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
    for item in items:
        time.sleep(0.2)
        yield item


def tune_in_a_process(folder: str) -> None:
    torch.set_num_threads(1)
    tuned(ADAMW, Path(folder), slowly)


@pytest.mark.timeout(180)
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=tune_in_a_process, args=(str(tmp_path),))
    process.start()
    deadline = time.monotonic() + 120
    while not list((tmp_path / "checkpoints").glob("batch-*.safetensors")):
        assert time.monotonic() < deadline
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "tuning.json").exists()
    starts: list[int] = []

    def track(items: Iterable[int], stage: str, total: int) -> Iterator[int]:
        for item in items:
            starts.append(item)
            yield item

    again = tuned(ADAMW, tmp_path, track)
    assert 0 < starts[0] < 14
    assert equal(again, tuned(ADAMW, None))
