"""Run the stages of a recipe into a run folder; every one goes on from the file before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from hawqkit import distributed
from hawqkit.costs import Meter
from hawqkit.errors import StateMismatch
from hawqkit.journal import locked, sweep
from hawqkit.pipeline.activations import find_ranges
from hawqkit.pipeline.choosing import choose, recipe_choice
from hawqkit.pipeline.costing import Estimate, Ledger, choosing_tokens, estimate, predicting_tokens
from hawqkit.pipeline.exporting import refuse_other_model
from hawqkit.pipeline.folder import RunFolder
from hawqkit.pipeline.hessian_scores import add_curvature, open_curvature
from hawqkit.pipeline.inputs import (
    Inputs,
    describe_data,
    describe_processes,
    load_inputs,
    probe_settings,
    settle,
)
from hawqkit.pipeline.progress import speaker, track
from hawqkit.pipeline.reporting import print_end, report_run
from hawqkit.pipeline.spectral import measure
from hawqkit.pipeline.tuning import load_tuning_data, open_tuned, tune_stage
from hawqkit.recipe import Recipe
from hawqkit.records import Allocation, Cost, Sensitivities, Validation
from hawqkit.sensitivity.probing import MOST_EXAMPLES, Prober
from hawqkit.store import fingerprint, to_plain, write_record, write_text_atomic
from hawqkit.targets import find_target
from hawqkit.tuning.outcome import Tuned
from hawqkit.validation.validating import validate_mixes

VALIDATION_TOKENS = 1024  # of a forward pass, so that logits stay small


def run(recipe: Recipe, folder: str | Path) -> None:
    """Do everything that a recipe says, and print the result.

    Killed at any moment and started again, it ends with the same records, bit for bit.

    Raises:
        HawqkitError: with one message that says what to do.
    """
    _run(recipe, Path(folder), only_probe=False)


def run_probe(recipe: Recipe, folder: str | Path) -> None:
    """Probe only: write `sensitivities.json`, from which `hawqkit allocate` can choose."""
    _run(recipe, Path(folder), only_probe=True)


def validate_run(folder: str | Path) -> Validation:
    """Measure the allocation of a run folder again, on the texts of its recipe."""
    run_folder = RunFolder(Path(folder))
    recipe = run_folder.read_recipe()
    with locked(run_folder.path):
        allocation = run_folder.read_allocation()
        inputs = load_inputs(recipe)
        refuse_other_model(allocation, inputs.model.facts)
        tuned = open_tuned(run_folder, inputs.model, allocation)
        return _validate(run_folder, inputs, allocation, tuned)


@dataclass(slots=True)
class _Stage:
    """What one call of `run` carries from stage to stage."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    load: Meter
    inputs: Inputs
    ledger: Ledger
    predicted: Estimate | None = None


def _run(recipe: Recipe, path: Path, *, only_probe: bool) -> None:
    console = speaker()
    console.print(f"hawqkit: {describe_processes()}")
    main = distributed.processes().is_main
    with Meter() as load:
        inputs = load_inputs(recipe)
        training = load_tuning_data(recipe, inputs.model) if recipe.tune is not None else None
    console.print(_describe(inputs))
    # Nothing is written before everything above has been found sound.
    lock = locked(path) if main else None
    if lock is not None:
        lock.__enter__()
    try:
        folder = RunFolder(path)
        stage = _Stage(recipe, folder, console, load, inputs, _ledger(recipe, folder, inputs))
        sensitivities = _probe(stage)
        if main:
            write_text_atomic(folder.recipe, settle(recipe, inputs.model).resolved_yaml())
            folder.write_sensitivities(sensitivities)
        if not only_probe:
            if recipe.spectrum is not None and inputs.spectrum is not None:
                text = inputs.spectrum
                measure(folder, recipe.spectrum, inputs.model, text, stage.ledger, console)
            allocation = distributed.gather(_choose(stage, sensitivities) if main else None)[0]
            if training is not None:
                tune_stage(recipe, folder, inputs, training, allocation, stage.ledger, console)
            if main:
                _prove(stage, allocation)
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
    distributed.wait()
    distributed.finish()


def _ledger(recipe: Recipe, folder: RunFolder, inputs: Inputs) -> Ledger:
    what = "data" if inputs.calibration.facts.classes else "text"
    texts = {f"{what} {name}": text.facts.hash for name, text in inputs.texts.items()}
    return Ledger(
        folder,
        {"calibration": recipe.calibration.seed, "probe": recipe.sensitivity.seed},
        {"model": inputs.model.facts.hash, "calibration": inputs.calibration.facts.hash, **texts},
    )


def _probe(stage: _Stage) -> Sensitivities:
    """Probe, or take what is there, and add the scores of the true Hessian that are asked for."""
    inputs, folder = stage.inputs, stage.folder
    ranges, calibrated = find_ranges(stage.recipe, inputs, folder)
    prober = Prober(
        inputs.model,
        inputs.calibration,
        stage.recipe.formats,
        probe_settings(stage.recipe),
        folder.journal,
        ranges,
    )
    # Not before the journals have been found to be of this model, text and seed: a folder that is
    # refused stays as it was.
    curvature = open_curvature(
        stage.recipe, inputs.model, inputs.calibration, prober.layers, folder.curvature_journal
    )
    if distributed.processes().is_main:
        sweep(folder.journal)
        sweep(folder.curvature_journal)
    distributed.wait()  # nobody writes a result before that
    load = stage.load
    stage.ledger.note("load", Cost(load.seconds, peak_memory_bytes=load.peak_bytes))
    if calibrated is not None:
        stage.ledger.note("activations", calibrated)
        if distributed.processes().is_main:
            write_record(folder.activations, ranges)
    finished = _finished(folder, prober.fingerprint)
    if finished is not None:
        stage.console.print("probe: taken from the run folder, nothing has changed")
    found = _measured(stage, prober) if finished is None else _counted(finished, prober)
    return add_curvature(found, curvature, str(inputs.model.device), stage.ledger, stage.console)


def _counted(finished: Sensitivities, prober: Prober) -> Sensitivities:
    """Return a finished table with operations, which a budget may have asked for only now."""
    counted = any(layer.macs for layer in prober.layers)
    return replace(finished, layers=prober.layers) if counted else finished


def _measured(stage: _Stage, prober: Prober) -> Sensitivities:
    """Take every micro-batch of the probe, and note what it cost."""
    device = str(stage.inputs.model.device)
    measured = 0
    with Meter(device) as meter:
        with Meter(device) as rounding:
            prober.prepare(track)
        with prober:
            for number in track(prober.mine, "probe", len(prober.mine)):
                with Meter(device) as batch:
                    fresh = prober.measure(number)
                measured += fresh
                if fresh and stage.predicted is None:
                    stage.predicted = _predict(stage, rounding, batch, prober)
        result = prober.finish()
    taken = len(prober.mine) - measured
    everywhere = sum(distributed.gather(measured))
    if taken:
        stage.console.print(f"probe: {taken} of {len(prober.mine)} micro-batches from the journal")
    predicted = stage.predicted
    stage.ledger.note(
        "probe",
        Cost(
            meter.seconds,
            float(everywhere),
            meter.peak_bytes,
            predicted.seconds["probe"] if predicted and not taken else None,
            predicted.memory_bytes if predicted and not taken else None,
        ),
    )
    return result


def _predict(stage: _Stage, rounding: Meter, batch: Meter, prober: Prober) -> Estimate:
    texts = stage.inputs.texts.values()
    predicted = estimate(
        load_seconds=stage.load.seconds,
        round_seconds=rounding.seconds,
        batch_seconds=batch.seconds,
        peak_bytes=max(rounding.peak_bytes, batch.peak_bytes),
        batches=len(prober.mine),
        batch_tokens=prober.size * stage.inputs.calibration.facts.length,
        validation_tokens=sum(t.facts.tokens for t in texts),
        mixes=1 + len(stage.recipe.validation.baselines),
        calibration_tokens=choosing_tokens(stage.inputs.calibration),
        withheld_tokens=predicting_tokens(stage.inputs.calibration),
    )
    stage.console.print(
        f"predicted from the first micro-batch: {predicted.total_seconds:.0f} s in all, "
        f"peak memory {predicted.memory_bytes / 2**30:.2f} GiB (errors cached as: {prober.keep})"
    )
    return predicted


def _finished(folder: RunFolder, wanted: str) -> Sensitivities | None:
    if not (folder.sensitivities.exists() and folder.samples.exists()):
        return None
    try:
        found = folder.read_sensitivities()
    except StateMismatch:
        return None  # damaged: the journal makes it again, to the same bits
    return found if found.fingerprint == wanted else None


def _choose(stage: _Stage, sensitivities: Sensitivities) -> Allocation:
    folder = stage.folder
    with Meter() as meter:
        stage.console.print("allocate: solving exactly, then resampling for stability")
        allocation, frontier = choose(sensitivities, recipe_choice(folder))
    write_record(folder.allocation, allocation)
    write_record(folder.frontier, frontier)
    stage.ledger.note("allocate", Cost(meter.seconds, peak_memory_bytes=meter.peak_bytes))
    return allocation


def _prove(stage: _Stage, allocation: Allocation) -> None:
    """Validate, export and report, with the tuned weights if there are any."""
    folder, ledger, model = stage.folder, stage.ledger, stage.inputs.model
    tuned = open_tuned(folder, model, allocation)
    with Meter(str(model.device)) as meter:
        fresh = _validation_needed(folder, stage.inputs, allocation, tuned)
        if fresh:
            _validate(folder, stage.inputs, allocation, tuned)
    if fresh:
        expected = stage.predicted.seconds["validate"] if stage.predicted else None
        ledger.note("validate", Cost(meter.seconds, 0.0, meter.peak_bytes, expected))
    with Meter() as meter:
        chosen = tuned.allocation if tuned is not None and tuned.allocation else allocation
        for target in stage.recipe.export:
            find_target(target).write(
                chosen, folder.export(target), tuned.model if tuned else model
            )
    ledger.note("export", Cost(meter.seconds, peak_memory_bytes=meter.peak_bytes))
    with Meter() as meter:
        report_run(folder.path)
    ledger.note("report", Cost(meter.seconds, peak_memory_bytes=meter.peak_bytes))
    report_run(folder.path)  # again, so that its own cost stands in it
    print_end(folder, stage.console)


def _validate(
    folder: RunFolder, inputs: Inputs, allocation: Allocation, tuned: Tuned | None
) -> Validation:
    calibration = inputs.calibration
    measured = [*inputs.texts.values(), calibration]
    batch = max(1, VALIDATION_TOKENS // max(t.facts.length for t in measured))
    if any(t.facts.classes for t in measured):  # an image is more than its one token
        batch = min(batch, MOST_EXAMPLES)
    useful = calibration.facts.classes or bool(calibration.withheld.any())
    result = validate_mixes(
        inputs.model,
        allocation,
        inputs.texts,
        track=track,
        batch=batch,
        calibration=calibration if useful else None,
        tuned=tuned.variant() if tuned is not None else None,
    )
    result = replace(result, allocation=_state(inputs, allocation, tuned))
    write_record(folder.validation, result)
    return result


def _validation_needed(
    folder: RunFolder, inputs: Inputs, allocation: Allocation, tuned: Tuned | None
) -> bool:
    try:
        before = folder.read_validation()
    except StateMismatch:
        return True
    return before is None or before.allocation != _state(inputs, allocation, tuned)


def _state(inputs: Inputs, allocation: Allocation, tuned: Tuned | None) -> str:
    """Return a hash of everything that a validation depends on."""
    texts = {name: text.facts.hash for name, text in inputs.texts.items()}
    facts = {"allocation": to_plain(allocation), "texts": texts, "model": inputs.model.facts.hash}
    return fingerprint(facts if tuned is None else {**facts, "tuned": tuned.record.tuned})


def _describe(inputs: Inputs) -> str:
    facts, data = inputs.model.facts, inputs.calibration.facts
    entries = sum(layer.numel for layer in inputs.model.layers)
    return (
        f"model: {facts.source}: {facts.architecture}, {facts.parameters / 1e6:.1f} M parameters, "
        f"stored as {facts.dtype}; {len(inputs.model.layers)} layers with {entries / 1e6:.1f} M "
        f"weights to choose for, {len(inputs.model.skipped)} left alone\n"
        f"{data.kind}: {data.source}: {describe_data(data)}, "
        f"{int(inputs.calibration.withheld.sum())} of them withheld"
    )
