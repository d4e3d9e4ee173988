"""Tune a quantized mix: straight-through rounding, learned scales, distillation.

transformers' Trainer is not used. It trains networks that return a loss from a data set and a
collator, and here any `nn.Module` is trained on the batches that the probe reads, with a loss that
is summed over all predictions of a batch and divided once. It keeps optimizer and random states
with `torch.save`, which is pickle, where a checkpoint here is safetensors alone. And what a step
does around its backward pass, to round each weight once and to send its gradients back through the
rounding, has no place in it. Processes, devices and the exchange between them come from Accelerate
(`hawqkit.distributed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hawqkit import distributed
from hawqkit.errors import DataError, InputError, StateMismatch
from hawqkit.journal import Journal
from hawqkit.models.batch import Data
from hawqkit.models.model import LoadedModel
from hawqkit.quantize.activations import refuse_other_model
from hawqkit.records import (
    ActivationRanges,
    Allocation,
    HeldOutLoss,
    Tuning,
    TuningCurve,
    Validation,
)
from hawqkit.sensitivity.probing import untracked
from hawqkit.store import fingerprint
from hawqkit.tuning.outcome import Tuned, finish, learned_scales
from hawqkit.tuning.saved import RECORD, fitted, load_tuned, write_tuned
from hawqkit.tuning.settings import TuneSettings, step_count
from hawqkit.tuning.student import Student
from hawqkit.tuning.training import Track, Trainer
from hawqkit.tuning.watching import Watch, batch_of
from hawqkit.validation.validating import validate_mixes

CHECKPOINTS = "checkpoints"


def tune(
    model: LoadedModel,
    mix: Allocation | Mapping[str, str],
    data: Data,
    *,
    settings: TuneSettings | None = None,
    activations: ActivationRanges | None = None,
    rounding: str = "searched",
    held_out: Mapping[str, Data] | None = None,
    folder: str | Path | None = None,
    track: Track | None = None,
) -> Tuned:
    """Train a network so that it predicts well with its layers rounded to a mix of formats.

    All floating-point parameters are trained: weights through their rounding, biases, norms and
    layers that keep their dtype as they are. The network stays in evaluation mode, so dropout is
    off. It is trained in float32 (float64 if it is that), whatever dtype it was loaded in. Killed
    and started again with the same folder, it ends with the same bits, on a CPU with as many
    threads.

    Args:
        model: the original; it is not changed.
        mix: an allocation, or layer name -> format name.
        data: examples with labels, or text; what is withheld does not train.
        settings: how to tune; the defaults if None.
        activations: ranges of the layers' inputs, where a bare mix rounds them; an allocation
            brings its own.
        rounding: of scales that are not learned, where a bare mix is given: `nearest` or
            `searched`; an allocation brings its own.
        held_out: name -> data on which the mix is measured before and after, and its loss along the
            way (on `watching.MOST` examples at most); with an allocation only.
        folder: keeps checkpoints and the result; None keeps nothing.
        track: shows progress, `(items, stage, total) -> items`.

    Returns:
        the tuned model, with its record.

    Raises:
        InputError: the mix, the ranges or the settings do not fit.
        StateMismatch: the mix or the ranges are of another model, or the folder holds another run.
        DataError: nothing is left to train on, or labels lie outside the classes.
        NumericalError: the loss is not finite; the last good checkpoint stays.
    """
    settings = settings or TuneSettings()
    allocation = mix if isinstance(mix, Allocation) else None
    if allocation is not None:
        if activations is not None:
            raise InputError("tune: an allocation brings its own activations; leave them out.")
        activations, rounding = allocation.activations, allocation.rounding
    elif held_out is not None:
        raise InputError(
            "tune: held_out is measured of an allocation, which says what its mix takes; for a "
            "bare mix use validation.measuring.measure_text with `Tuned.variant()`."
        )
    layers = dict(allocation.layers if allocation is not None else _plain(mix))
    _refuse_strangers(model, allocation, activations)
    facts = _facts(model, layers, data, settings, activations, rounding)
    finished = _finished(folder, facts, model, allocation)
    if finished is not None and _measured_on(finished, held_out):
        return finished
    watch = Watch(held_out, batch_of(held_out)) if held_out else None
    tuned = finished or _trained(
        model, layers, data, settings, activations, rounding, facts, folder, track, watch
    )
    if finished is not None:
        tuned = replace(tuned, record=replace(tuned.record, held_out=_of(tuned.record, held_out)))
    if allocation is not None:
        tuned = replace(tuned, allocation=fitted(allocation, tuned.model, tuned.activations))
        seen = _compare(model, allocation, tuned, held_out, track) if held_out else None
        record = replace(tuned.record, allocation=allocation.sensitivities, validation=seen)
        tuned = replace(tuned, record=record)
    if folder is not None:
        if distributed.processes().is_main:
            write_tuned(Path(folder), tuned)
        distributed.wait()
    return tuned


def _trained(
    model: LoadedModel,
    layers: dict[str, str],
    data: Data,
    settings: TuneSettings,
    activations: ActivationRanges | None,
    rounding: str,
    facts: dict[str, Any],
    folder: str | Path | None,
    track: Track | None,
    watch: Watch | None,
) -> Tuned:
    """Train, and take the rounding into the weights."""
    examples = int((~data.withheld).sum())
    if examples == 0:
        raise DataError(f"tune: all {len(data)} examples of {data.facts.source} are withheld.")
    student = Student(model, layers, settings, rounding=rounding, activations=activations)
    curve = Trainer(
        student,
        model.module if settings.distillation is not None else None,
        data,
        settings,
        model.device,
        None if folder is None else _journal(folder, facts),
        track,
        watch,
    ).run()
    moved, warnings = learned_scales(student)
    if settings.learns_inputs and not student.inputs:
        warnings = (
            *warnings,
            "tune: learned_scales asks for scales of inputs too, and the mix rounds no inputs.",
        )
    found, unrounded, ranges = finish(student, model, activations)
    record = Tuning(
        model=model.facts.hash,
        tuned=found.facts.hash,
        layers=layers,
        data=data.facts,
        examples=examples,
        settings={**settings.facts(), "rounding": rounding},
        steps=step_count(settings, examples),
        curve=TuningCurve(**{name: tuple(values) for name, values in curve.items()}),
        learned=moved,
        held_out=tuple(watch.found) if watch is not None else (),
        fingerprint=fingerprint(facts),
        warnings=warnings,
    )
    return Tuned(found, layers, rounding, ranges, unrounded, record)


def _compare(
    model: LoadedModel,
    allocation: Allocation,
    tuned: Tuned,
    texts: Mapping[str, Data],
    track: Track | None,
) -> Validation:
    """Measure the mix before and after, in the main process, and tell all of them."""
    found = None
    if distributed.processes().is_main:
        alone = replace(allocation, baselines=())
        found = validate_mixes(
            model,
            alone,
            texts,
            track=track or untracked,
            batch=batch_of(texts),
            tuned=tuned.variant(),
        )
    result: Validation = distributed.gather(found)[0]
    return result


def _of(record: Tuning, held_out: Mapping[str, Data] | None) -> tuple[HeldOutLoss, ...]:
    """Return what a finished record knows of these very data."""
    before = record.validation.texts if record.validation is not None else {}
    same = {
        n for n, d in (held_out or {}).items() if n in before and before[n].hash == d.facts.hash
    }
    return tuple(point for point in record.held_out if point.text in same)


def _journal(folder: str | Path, facts: Mapping[str, Any]) -> Journal:
    """Return the checkpoints of a folder.

    Raises:
        StateMismatch: they are of another run; says what differs.
    """
    place = Path(folder)
    advice = f"Tune into another folder, or remove {place} to tune anew."
    return Journal(place / CHECKPOINTS, facts, advice=advice)


def _finished(
    folder: str | Path | None,
    facts: Mapping[str, Any],
    model: LoadedModel,
    allocation: Allocation | None,
) -> Tuned | None:
    """Return what a folder holds of exactly this run, None if it is unfinished or damaged.

    Raises:
        StateMismatch: the folder holds another run.
    """
    if folder is None or not (Path(folder) / RECORD).exists():
        return None
    _journal(folder, facts)  # refuses another run, and says what differs
    try:
        found = load_tuned(folder, model, allocation)
    except InputError:
        return None  # damaged: made again from the last checkpoint, to the same bits
    return found if found.record.fingerprint == fingerprint(facts) else None


def _measured_on(tuned: Tuned, held_out: Mapping[str, Data] | None) -> bool:
    """Whether the record already says what there is to say of this data."""
    if not held_out:
        return True
    seen = tuned.record.validation
    hashes = {name: text.facts.hash for name, text in held_out.items()}
    return seen is not None and {n: f.hash for n, f in seen.texts.items()} == hashes


def _plain(mix: Any) -> Mapping[str, str]:
    if not isinstance(mix, Mapping):
        raise InputError(
            f"tune: the mix is a {type(mix).__name__}; give an allocation, or a mapping of layer "
            "names to format names."
        )
    return mix


def _refuse_strangers(
    model: LoadedModel, allocation: Allocation | None, ranges: ActivationRanges | None
) -> None:
    if allocation is not None and allocation.model != model.facts.hash:
        raise StateMismatch(
            f"tune: the allocation is of a model with hash {allocation.model[:12]}, and "
            f"{model.facts.source} has {model.facts.hash[:12]}; tune the model that it was chosen "
            "for."
        )
    if ranges is not None:
        refuse_other_model(ranges, model)


def _facts(
    model: LoadedModel,
    layers: Mapping[str, str],
    data: Data,
    settings: TuneSettings,
    ranges: ActivationRanges | None,
    rounding: str,
) -> dict[str, Any]:
    """Return everything that the result depends on."""
    return {
        "kind": "tuning",
        "model": model.facts.hash,
        "data": data.facts.hash,
        "layers": dict(layers),
        "rounding": rounding,
        "activations": None if ranges is None else ranges.fingerprint,
        **{f"settings.{name}": value for name, value in settings.facts().items()},
    }
