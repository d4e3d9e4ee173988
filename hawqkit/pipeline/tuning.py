"""Tune the allocation of a run, and find what was tuned when it is validated or exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hawqkit import distributed
from hawqkit.costs import Meter
from hawqkit.errors import InputError, RecipeError
from hawqkit.journal import locked, sweep
from hawqkit.models import Data, LoadedModel
from hawqkit.pipeline.costing import Ledger
from hawqkit.pipeline.exporting import refuse_other_model
from hawqkit.pipeline.folder import RunFolder
from hawqkit.pipeline.inputs import (
    Inputs,
    describe_data,
    describe_processes,
    load_inputs,
    load_text,
)
from hawqkit.pipeline.progress import speaker, track
from hawqkit.recipe import Recipe, TuneSection, load_recipe
from hawqkit.records import Allocation, Cost, Tuning
from hawqkit.tuning.outcome import Tuned
from hawqkit.tuning.saved import RECORD, load_tuned
from hawqkit.tuning.settings import Distillation, TuneSettings
from hawqkit.tuning.tuning import CHECKPOINTS, tune

# What a step takes, in gradients of as many examples; the original's forward pass is a third.
FORWARD_SHARE = 1 / 3


def tune_run(folder: str | Path, overrides: Sequence[str] = ()) -> Tuning:
    """Tune the allocation of a run folder as its recipe says, or with defaults.

    Killed at any moment and started again, it goes on and ends with the same bits.

    Args:
        folder: a run folder with an allocation.
        overrides: `tune.a=b`, changes to the section `tune` of the run's recipe.

    Raises:
        RecipeError: an override is wrong, or is not of `tune`.
        InputError: the folder holds no allocation.
        StateMismatch: the records, the model and the folder's tuning do not belong together.
        NumericalError: the loss is not finite.
    """
    run = RunFolder(Path(folder))
    _refuse_other_overrides(overrides)
    run.read_recipe()  # says what is wrong with a folder that is none
    recipe = load_recipe(run.recipe, overrides)
    console = speaker()
    console.print(f"hawqkit: {describe_processes()}")
    allocation = run.read_allocation()
    with Meter() as load:
        inputs = load_inputs(recipe)
        data = load_tuning_data(recipe, inputs.model)
    refuse_other_model(allocation, inputs.model.facts)
    main = distributed.processes().is_main
    lock = locked(run.path) if main else None
    if lock is not None:
        lock.__enter__()
    try:
        hashes = {"model": inputs.model.facts.hash, "tune": data.facts.hash}
        seeds = {"calibration": recipe.calibration.seed, "tune": _section(recipe).seed}
        ledger = Ledger(run, seeds, hashes)
        found = tune_stage(recipe, run, inputs, data, allocation, ledger, console)
        # Not before the folder has been found to be of this model, data and settings.
        ledger.note("load", Cost(load.seconds, peak_memory_bytes=load.peak_bytes))
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
    distributed.wait()
    distributed.finish()
    return found.record


def tune_stage(
    recipe: Recipe,
    run: RunFolder,
    inputs: Inputs,
    data: Data,
    allocation: Allocation,
    ledger: Ledger,
    console: Console,
) -> Tuned:
    """Tune, or take what is there; every process must come here, with the same allocation."""
    settings = tune_settings(_section(recipe))
    examples = int((~data.withheld).sum())
    console.print(f"tune: {data.facts.source}: {describe_data(data.facts)}, {examples} train")
    with Meter(str(inputs.model.device)) as meter:
        found = tune(
            inputs.model,
            allocation,
            data,
            settings=settings,
            held_out=inputs.texts,
            folder=run.tuning,
            track=track,
        )
    if distributed.processes().is_main:
        sweep(run.tuning / CHECKPOINTS)  # now that they are known to be of this run
    if found.taken:
        console.print("tune: taken from the run folder, nothing has changed")
        return found
    passes = 1 + (FORWARD_SHARE if settings.distillation is not None else 0)
    gradients = found.record.steps * settings.batch * passes
    ledger.note("tune", Cost(meter.seconds, float(gradients), meter.peak_bytes))
    for warning in found.record.warnings:
        console.print(f"warning: {warning}")
    return found


def open_tuned(run: RunFolder, model: LoadedModel, allocation: Allocation) -> Tuned | None:
    """Return the tuned model of a run, None if its allocation was not tuned.

    Raises:
        StateMismatch: what was tuned is another mix or model, or is damaged.
    """
    if not (run.tuning / RECORD).exists():
        return None
    return load_tuned(run.tuning, model, allocation)


def load_tuning_data(recipe: Recipe, model: LoadedModel) -> Data:
    """Load what trains: data of the calibration's source, as much as the section says.

    Raises:
        DataError: there is less than that; the message says how much there is.
    """
    section = _section(recipe)
    more = {"examples": section.examples, "sequences": section.sequences}
    if section.length is not None:
        more["length"] = section.length
    try:
        return load_text(recipe.calibration.model_copy(update=more), model)
    except InputError as error:
        raise type(error)(f"tune: {error}") from None


def tune_settings(section: TuneSection) -> TuneSettings:
    """Return what a section of a recipe asks for."""
    plain = section.model_dump(exclude={"examples", "sequences", "length", "distillation"})
    taught = section.distillation
    distillation = None if taught is None else Distillation(taught.alpha, taught.temperature)
    return replace(TuneSettings(**plain), distillation=distillation)


def _section(recipe: Recipe) -> TuneSection:
    return recipe.tune or TuneSection()


def _refuse_other_overrides(overrides: Sequence[str]) -> None:
    """Refuse changes to what the allocation was made from."""
    others = [text for text in overrides if not text.strip().startswith(("tune.", "tune="))]
    if others:
        raise RecipeError(
            "--set",
            [
                f"{text}: the allocation of this run was made with another value; only the section "
                "tune can be changed here, as in --set tune.epochs=3."
                for text in others
            ],
        )
