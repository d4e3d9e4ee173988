"""The ranges of the layers' inputs in a run: found before the probe, kept in the run folder."""

from __future__ import annotations

from dataclasses import asdict
from math import ceil

from hawqkit import distributed
from hawqkit.costs import Meter
from hawqkit.errors import InputError
from hawqkit.formats import activation_bits_of
from hawqkit.pipeline.folder import RunFolder
from hawqkit.pipeline.inputs import Inputs
from hawqkit.pipeline.progress import track
from hawqkit.quantize.activations import (
    PERCENTILE,
    ActivationSettings,
    calibrate_activations,
    calibration_batch,
)
from hawqkit.quantize.input_rounding import input_modules
from hawqkit.recipe import Recipe
from hawqkit.records import ActivationRanges, Cost
from hawqkit.records.activations import DYNAMIC
from hawqkit.sensitivity.fitting import fitting_layers, ranges_for
from hawqkit.store import read_record


def activation_settings(recipe: Recipe) -> ActivationSettings | None:
    """Return how a recipe quantizes the inputs of layers, None where no format does so."""
    section = recipe.activations
    if not activation_bits_of(recipe.formats):
        return None
    if section is None:
        return ActivationSettings()
    return ActivationSettings(
        observer=section.observer,
        mode=section.mode,
        percentile=PERCENTILE if section.percentile is None else section.percentile,
        symmetric=section.symmetric,
    )


def find_ranges(
    recipe: Recipe, inputs: Inputs, folder: RunFolder
) -> tuple[ActivationRanges | None, Cost | None]:
    """Return the ranges of a run and what they cost: those of its folder, if they still hold.

    All processes return the same ranges, those of the main process. Nothing is written.

    Raises:
        NumericalError: an input is NaN or infinite.
    """
    settings = activation_settings(recipe)
    if settings is None:
        return None, None
    kept = distributed.gather(_kept(recipe, inputs, folder, settings))[0]
    if kept is not None:
        return kept, None
    model, data = inputs.model, inputs.calibration
    with Meter(str(model.device)) as meter:
        found = ranges_for(model, data, recipe.formats, recipe.layers.misfits, settings, track)
    found = distributed.gather(found)[0]
    return found, Cost(meter.seconds, peak_memory_bytes=meter.peak_bytes)


def rehearse_ranges(recipe: Recipe, inputs: Inputs) -> tuple[ActivationRanges | None, float]:
    """Find ranges on one batch, and return them with the seconds that all batches would take."""
    settings = activation_settings(recipe)
    if settings is None:
        return None, 0.0
    model, data = inputs.model, inputs.calibration
    layers = fitting_layers(model, recipe.formats, recipe.layers.misfits)[0]
    bits, size = activation_bits_of(recipe.formats), calibration_batch(settings.batch, data.facts)
    with Meter(str(model.device)) as meter:
        found = calibrate_activations(model, data, layers, bits, **asdict(settings), examples=size)
    chosen = int((~data.withheld).sum())
    share = ceil(ceil(chosen / size) / distributed.processes().count)
    return found, meter.seconds * share if found.layers else 0.0


def _kept(
    recipe: Recipe, inputs: Inputs, folder: RunFolder, settings: ActivationSettings
) -> ActivationRanges | None:
    """Return the ranges of the folder, None if there are none or they are of something else."""
    if not folder.activations.exists():
        return None
    try:
        found = read_record(folder.activations, ActivationRanges)
    except InputError:
        return None  # damaged: found again, to the same numbers
    model = inputs.model
    layers = fitting_layers(model, recipe.formats, recipe.layers.misfits)[0]
    names = {layer.name for layer in layers if input_modules(model.module, layer)}
    of = (model.facts.hash, inputs.calibration.facts.hash, activation_bits_of(recipe.formats))
    same = settings.made(found) and (found.model, found.data, found.bits) == of
    covered = found.mode == DYNAMIC or set(found.layers) == names
    return found if same and covered else None
