"""The scores of the true Hessian in a run: opened with the probe's journal, measured after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from hawqkit.costs import Meter
from hawqkit.models import Data, LoadedModel
from hawqkit.pipeline.costing import Ledger
from hawqkit.pipeline.progress import track
from hawqkit.recipe import Recipe
from hawqkit.records import Cost, Layer, Sensitivities
from hawqkit.sensitivity.curvature_probe import CurvatureProbe, CurvatureSettings
from hawqkit.sensitivity.curvature_scores import with_curvature, without_curvature


def open_curvature(
    recipe: Recipe,
    model: LoadedModel,
    text: Data,
    layers: Sequence[Layer],
    folder: Path | None = None,
) -> CurvatureProbe | None:
    """Return the measurement that a recipe asks for, None where it asks for no such score.

    Raises:
        DataError: too little text counts.
        StateMismatch: the folder is of another model, text or settings.
    """
    scores = recipe.sensitivity.curvature_scores()
    if not scores:
        return None
    return CurvatureProbe(model, text, layers, scores, curvature_settings(recipe), folder)


def curvature_settings(recipe: Recipe) -> CurvatureSettings:
    """Return what a recipe lets the scores of the true Hessian cost."""
    section = recipe.sensitivity.curvature
    return CurvatureSettings(
        sequences=section.sequences,
        length=section.length,
        shards=section.shards,
        relative_error=section.relative_error,
        max_probes=section.max_probes,
        max_products=section.max_products,
        seed=recipe.sensitivity.seed,
    )


def add_curvature(
    found: Sensitivities,
    probe: CurvatureProbe | None,
    device: str,
    ledger: Ledger,
    console: Console,
) -> Sensitivities:
    """Measure, or go on, and return the table with the scores; without a probe, without them.

    A folder that was measured with other scores gives the table that its recipe asks for now.
    """
    if probe is None:
        return without_curvature(found)
    if found.curvature is not None and found.curvature.fingerprint == probe.fingerprint:
        console.print("curvature: taken from the run folder, nothing has changed")
        return found
    measured = 0
    with Meter(device) as meter:
        for piece in track(probe.pieces, "curvature", len(probe.pieces)):
            measured += probe.measure(piece)
    curvature = probe.finish()
    taken = len(probe.pieces) - measured
    if taken:
        console.print(f"curvature: {taken} of {len(probe.pieces)} pieces from the journal")
    console.print(
        f"curvature: {', '.join(probe.scores)}: {curvature.products:,} products of a layer's "
        "Hessian with a vector"
    )
    if measured:  # else the journal had it all, and the cost of before stands
        ledger.note("curvature", Cost(meter.seconds, peak_memory_bytes=meter.peak_bytes))
    return with_curvature(found, curvature)


def rehearse(probe: CurvatureProbe | None, device: str) -> tuple[float, int]:
    """Return the predicted seconds of a measurement, and the memory at its peak, by a sample."""
    if probe is None:
        return 0.0, 0
    seconds, peak = 0.0, 0
    for score in probe.scores:
        probe.rehearse(score, most=1)  # it also pays for fresh memory, which the others do not
        with Meter(device) as meter:
            share = probe.rehearse(score)
        seconds += meter.seconds * share
        peak = max(peak, meter.peak_bytes)
    return seconds, peak
