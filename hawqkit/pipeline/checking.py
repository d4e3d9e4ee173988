"""`hawqkit check`: resolve everything, run one micro-batch, and say what a run would take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hawqkit.allocation.sizes import totals
from hawqkit.costs import Meter, available_bytes
from hawqkit.formats import NONE, parse_format
from hawqkit.models import Data
from hawqkit.pipeline.activations import rehearse_ranges
from hawqkit.pipeline.choosing import size_tables
from hawqkit.pipeline.costing import Estimate, choosing_tokens, estimate, predicting_tokens
from hawqkit.pipeline.hessian_scores import open_curvature, rehearse
from hawqkit.pipeline.inputs import (
    Inputs,
    describe_data,
    describe_processes,
    load_inputs,
    probe_settings,
)
from hawqkit.pipeline.progress import track
from hawqkit.pipeline.spectral import settings_of
from hawqkit.pipeline.tuning import load_tuning_data, tune_settings
from hawqkit.recipe import Recipe
from hawqkit.records import ActivationRanges, DataFacts, Layer, ModelFacts, Skipped
from hawqkit.report.wording import duration, plural, significant
from hawqkit.sensitivity.confidence import KlLimit
from hawqkit.sensitivity.probing import Prober
from hawqkit.spectrum.rehearsing import rehearse_spectrum
from hawqkit.tuning.rehearsing import Rehearsal, rehearse_tuning


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What a run would do and take.

    Attributes:
        predicted: seconds by stage, and peak memory.
        available_bytes: memory that the device had free before the model was loaded.
        sizes: (format, bits per weight, target -> bytes) with every layer in that format.
        budgets: limits on what a mix takes.
        kl_limit: on its predicted KL, None if there is none.
        cache: what `cache` resolves to.
        batch: examples of a micro-batch.
        tuning: what tuning would take, None if the recipe does not ask for it.
        tuning_bytes: peak memory while it was rehearsed.
    """

    processes: str
    model: ModelFacts
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    texts: dict[str, DataFacts]
    sizes: tuple[tuple[str, float, dict[str, int]], ...]
    budgets: dict[str, float]
    kl_limit: KlLimit | None
    predicted: Estimate
    available_bytes: int
    cache: str
    batch: int
    checkpointing: bool
    tuning: Rehearsal | None = None
    tuning_bytes: int = 0

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the memory that was free."""
        return self.predicted.memory_bytes <= self.available_bytes


def check(recipe: Recipe) -> CheckResult:
    """Load what a recipe names, refuse what would fail later, and measure one micro-batch twice.

    Of the true Hessian's scores, if any is asked for, it measures one layer; of a spectrum it makes
    two products with the whole matrix and two with a layer's; of tuning two steps in a copy, whose
    layers are in a format that stands for the mix. Writes nothing. An impossible budget is refused
    here, as in a run.
    """
    processes = describe_processes()
    with Meter() as load:
        inputs = load_inputs(recipe)
        training = load_tuning_data(recipe, inputs.model) if recipe.tune is not None else None
    device = str(inputs.model.device)
    free = available_bytes(device) + load.extra_bytes
    settings = probe_settings(recipe)
    ranges, activation_seconds = rehearse_ranges(recipe, inputs)
    prober = Prober(inputs.model, inputs.calibration, recipe.formats, settings, None, ranges)
    curvature = open_curvature(recipe, inputs.model, inputs.calibration, prober.layers)
    with Meter(device) as rounding:
        prober.prepare(track)
    with prober:
        prober.measure(0)  # the first pass also pays for fresh memory, which the others do not
        with Meter(device) as batch:
            prober.measure(0)
    curvature_seconds, curvature_peak = rehearse(curvature, device)
    spectrum_seconds, spectrum_peak = _rehearse_spectrum(recipe, inputs, device)
    tuning, tuning_peak = _rehearse_tuning(recipe, inputs, training, prober.layers, ranges)
    texts = {"calibration": inputs.calibration, **inputs.texts}
    return CheckResult(
        processes=processes,
        model=inputs.model.facts,
        layers=prober.layers,
        skipped=prober.skipped,
        texts={name: text.facts for name, text in texts.items()},
        sizes=_sizes(recipe, inputs.model.facts, prober.layers),
        budgets=recipe.budget.limits(),
        kl_limit=recipe.budget.kl_limit(),
        predicted=estimate(
            load_seconds=load.seconds,
            round_seconds=rounding.seconds,
            batch_seconds=batch.seconds,
            peak_bytes=max(
                rounding.peak_bytes, batch.peak_bytes, curvature_peak, spectrum_peak, tuning_peak
            ),
            batches=len(prober.mine),
            batch_tokens=prober.size * inputs.calibration.facts.length,
            validation_tokens=sum(t.facts.tokens for t in inputs.texts.values()),
            mixes=1 + len(recipe.validation.baselines),
            calibration_tokens=choosing_tokens(inputs.calibration),
            withheld_tokens=predicting_tokens(inputs.calibration),
            curvature_seconds=curvature_seconds,
            spectrum_seconds=spectrum_seconds,
            activation_seconds=activation_seconds,
            tuning_seconds=tuning.seconds if tuning is not None else 0.0,
        ),
        available_bytes=free,
        cache=prober.keep,
        batch=prober.size,
        checkpointing=settings.checkpointing,
        tuning=tuning,
        tuning_bytes=tuning_peak,
    )


def _sizes(
    recipe: Recipe, facts: ModelFacts, layers: Sequence[Layer]
) -> tuple[tuple[str, float, dict[str, int]], ...]:
    """Return (format, bits per weight, target -> bytes) with every layer in that format.

    Where misfits are `partial`, a layer that the format does not fit stays as it is stored.
    """
    sizes = []
    for name in recipe.formats:
        form = parse_format(name)
        mix = {x.name: name if form.fits(x.columns) else NONE.name for x in layers}
        tables = size_tables(recipe.export, layers, tuple(dict.fromkeys(mix.values())), facts)
        uniform = totals(layers, mix, tables)
        sizes.append((name, uniform.bits_per_weight, uniform.size))
    return tuple(sizes)


def _rehearse_spectrum(recipe: Recipe, inputs: Inputs, device: str) -> tuple[float, int]:
    """Return the seconds that the spectrum will take, and the peak of memory of one product."""
    if recipe.spectrum is None or inputs.spectrum is None:
        return 0.0, 0
    with Meter(device) as meter:
        seconds = rehearse_spectrum(inputs.model, inputs.spectrum, settings_of(recipe.spectrum))
    return seconds, meter.peak_bytes


def _rehearse_tuning(
    recipe: Recipe,
    inputs: Inputs,
    training: Data | None,
    layers: Sequence[Layer],
    ranges: ActivationRanges | None,
) -> tuple[Rehearsal | None, int]:
    """Return what tuning will take, and the peak of memory of its first steps."""
    if recipe.tune is None or training is None:
        return None, 0
    with Meter(str(inputs.model.device)) as meter:
        found = rehearse_tuning(
            inputs.model,
            layers,
            recipe.formats,
            training,
            tune_settings(recipe.tune),
            rounding=recipe.rounding,
            activations=ranges,
            held_out=inputs.texts,
        )
    return found, meter.peak_bytes


def print_check(result: CheckResult, console: Console) -> None:
    """Print what `check` found, in one screen."""
    facts, entries = result.model, sum(layer.numel for layer in result.layers)
    console.print(f"{result.processes}")
    console.print(
        f"[bold]{facts.source}[/bold]: {facts.architecture}, {facts.parameters / 1e6:.1f} M "
        f"parameters stored as {facts.dtype}"
    )
    kinds = Counter((x.name.rpartition(".")[2], x.rows, x.columns) for x in result.layers)
    shown = ", ".join(f"{n} x {k[0]} ({k[1]} x {k[2]})" for k, n in kinds.items())
    console.print(f"{len(result.layers)} layers, {entries / 1e6:.1f} M weights: {shown}")
    for skip in result.skipped:
        console.print(f"left alone: {skip.name} {skip.shape}: {skip.reason}", highlight=False)
    for name, data in result.texts.items():
        console.print(f"{name}: {data.source}: {describe_data(data)}{_counted(data)}")
    table = Table("every layer in", "bits/weight", *(f"{t} MB" for t in result.sizes[0][2]))
    for name, bits, size in result.sizes:
        table.add_row(name, f"{bits:.3f}", *(f"{b / 1e6:.1f}" for b in size.values()))
    console.print(table)
    if result.budgets:
        budgets = ", ".join(f"{k} {v:g}" for k, v in result.budgets.items())
        console.print(f"budget: {budgets}: possible")
    if result.kl_limit is not None:
        console.print(f"budget: {result.kl_limit}: whether it is possible, the probe will tell")
    stages = ", ".join(f"{k} {v:.0f} s" for k, v in result.predicted.seconds.items())
    console.print(f"predicted time: {result.predicted.total_seconds:.0f} s ({stages})")
    if result.tuning is not None:
        console.print(_describe_tuning(result.tuning, result.tuning_bytes))
    verdict = "fits" if result.fits else "does NOT fit"
    console.print(
        f"predicted peak memory: {result.predicted.memory_bytes / 2**30:.2f} GiB, which {verdict} "
        f"in the {result.available_bytes / 2**30:.1f} GiB that are free; micro-batches of "
        f"{result.batch}, errors cached as {result.cache}, checkpointing "
        f"{'on' if result.checkpointing else 'off'}"
    )
    if not result.fits:
        console.print(
            "to need less: sensitivity.cache none, sensitivity.checkpointing true, a smaller "
            f"sensitivity.batch{_or_shorter(result.texts['calibration'])}"
        )


def _counted(data: DataFacts) -> str:
    """Return the predictions of a text; one of a classifier is an example."""
    return "" if data.classes else f", {data.counted} predictions"


def _describe_tuning(found: Rehearsal, peak_bytes: int) -> str:
    return (
        f"tune: about {duration(found.seconds)} for {plural(found.steps, 'step')}, peak memory "
        f"{peak_bytes / 2**30:.2f} GiB: an estimate by two steps with layers in "
        f"{', '.join(found.formats)}, {significant(found.step_seconds, 2)} s each"
    )


def _or_shorter(data: DataFacts) -> str:
    return "" if data.length == 1 else ", or shorter sequences"
