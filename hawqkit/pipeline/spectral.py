"""The spectrum of a run: measured on a little calibration text, into its own record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from hawqkit import distributed
from hawqkit.costs import Meter
from hawqkit.errors import InputError, StateMismatch
from hawqkit.journal import locked, sweep
from hawqkit.models import Data, LoadedModel
from hawqkit.pipeline.costing import Ledger
from hawqkit.pipeline.folder import RunFolder
from hawqkit.pipeline.inputs import (
    describe_processes,
    fold_as_asked,
    load_recipe_model,
    load_spectrum_text,
    settle,
)
from hawqkit.pipeline.progress import notices, speaker, track
from hawqkit.recipe import Recipe, SpectrumSection
from hawqkit.records import Cost, Spectrum
from hawqkit.report.wording import duration
from hawqkit.spectrum.blocks import BlockSettings
from hawqkit.spectrum.measuring import SpectrumSettings, batches_of, measure_spectrum
from hawqkit.spectrum.rehearsing import rehearse_spectrum
from hawqkit.store import write_text_atomic

# What a product with the matrix over all weights takes, in gradients: SmolLM2 on two CPU cores, by
# benchmarks/hessian_products.py. A layer's takes less, so the sum is an upper bound.
PASSES = {"hessian": 2.9, "gauss-newton": 2.5}
LONG = 60.0  # seconds from which it is said beforehand what a spectrum takes


def run_spectrum(recipe: Recipe, folder: str | Path) -> None:
    """Measure the spectrum that a recipe asks for, or one with defaults, into a run folder.

    Killed at any moment and started again, it goes on and ends with the same records, bit for bit.

    Raises:
        HawqkitError: with one message that says what to do.
    """
    section = recipe.spectrum or SpectrumSection()
    console = speaker()
    console.print(f"hawqkit: {describe_processes()}")
    with Meter() as load:
        model = load_recipe_model(recipe)
        text = load_spectrum_text(recipe.calibration, section, model)
        model = fold_as_asked(recipe, model, text)
    main = distributed.processes().is_main
    run = RunFolder(Path(folder))
    lock = locked(run.path) if main else None
    if lock is not None:
        lock.__enter__()
    try:
        seeds = {"calibration": recipe.calibration.seed}
        ledger = Ledger(run, seeds, {"model": model.facts.hash})
        measure(run, section, model, text, ledger, console)
        ledger.note("load", Cost(load.seconds, peak_memory_bytes=load.peak_bytes))
        if main and not run.recipe.exists():
            asked = recipe.model_copy(update={"spectrum": section})
            write_text_atomic(run.recipe, settle(asked, model).resolved_yaml())
    finally:
        if lock is not None:
            lock.__exit__(None, None, None)
    distributed.wait()
    distributed.finish()


def measure(
    run: RunFolder,
    section: SpectrumSection,
    model: LoadedModel,
    text: Data,
    ledger: Ledger,
    console: Console,
) -> Spectrum | None:
    """Measure, or go on, and write the record; None in processes other than the main one."""
    kept = _entries(run)
    if distributed.gather(kept == 0)[0]:
        _foretell(section, model, text, console)
    with notices(), Meter(str(model.device)) as meter:
        found = measure_spectrum(
            model, text, settings_of(section), folder=run.spectrum_journal, track=track
        )
    if found is None:
        return None
    sweep(run.spectrum_journal)  # now that it is known to be of this run
    if _same(run, found):
        console.print("spectrum: taken from the run folder, nothing has changed")
        return found
    run.write_spectrum(found)
    products = sum(block.products for block in found.everything)
    console.print(
        f"spectrum: {len(found.everything)} blocks, {products:,} products of the "
        f"{found.kind} matrix with a vector"
    )
    if _entries(run) != kept:  # else the journal had it all, and the cost of before stands
        passes = products * PASSES[found.kind] * sum(1 for _ in batches_of(text, found.kind))
        ledger.note("spectrum", Cost(meter.seconds, passes, meter.peak_bytes))
    return found


def _foretell(section: SpectrumSection, model: LoadedModel, text: Data, console: Console) -> None:
    """Say before the first block what all of them will take; every process must come here."""
    seconds = rehearse_spectrum(model, text, settings_of(section))
    if seconds >= LONG:
        console.print(
            f"spectrum: about {duration(seconds)}, by a few products; spectrum.layers, draws, "
            "steps, top and sequences make it shorter"
        )


def settings_of(section: SpectrumSection) -> SpectrumSettings:
    """Return what a section of a recipe asks for."""
    return SpectrumSettings(
        kind=section.kind,
        layers=section.layers,
        whole=section.whole,
        eps=section.eps,
        each=BlockSettings(section.top, section.steps, section.draws, section.seed),
    )


def _entries(run: RunFolder) -> int:
    """Return how many blocks the journal holds."""
    return len(list(run.spectrum_journal.glob("batch-*.safetensors")))


def _same(run: RunFolder, found: Spectrum) -> bool:
    """Whether the folder already holds this record, undamaged.

    The model may go by another path: a run folder's recipe holds an absolute one.
    """
    try:
        kept = run.read_spectrum()
        return kept is not None and replace(kept, model=found.model) == found
    except (InputError, StateMismatch):
        return False
