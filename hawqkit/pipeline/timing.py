"""Fill a latency table on this machine: a recipe or a run in, `latency.csv` out."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from hawqkit.allocation.latency import FIXED
from hawqkit.errors import InputError
from hawqkit.pipeline.folder import RunFolder
from hawqkit.recipe import Recipe, load_recipe
from hawqkit.records import LatencyTable
from hawqkit.store import write_text_atomic

COLUMNS = ("layer", "shape", "format", "milliseconds", "stderr", "alone", "operation")


def time_layers(
    source: str,
    output: str | Path,
    *,
    runtime: str = "onnxruntime",
    formats: Sequence[str] | None = None,
    batch: int = 1,
    threads: int = 1,
    rounds: int = 15,
    mixes: int | None = None,
) -> LatencyTable:
    """Measure the layers of a recipe's model in a runtime, and write the table.

    Args:
        source: a recipe, by name or file; or a run folder, around whose allocation mixes are timed
            if it holds one.
        output: the CSV file to write.
        runtime: `onnxruntime`.
        formats: names; None takes the recipe's, and `none`.
        batch: examples in one run, from the calibration data.
        threads: of one operation.
        rounds: readings of each graph.
        mixes: whole models to time; None takes enough.

    Raises:
        InputError: the recipe or a number is wrong.
        HawqkitError: the packages of the extra `onnx` are missing.
        Unsupported: the target `onnx` cannot hold the model in these formats.
    """
    recipe, near = _recipe_of(source)
    from hawqkit.pipeline.inputs import load_inputs  # imports torch
    from hawqkit.targets.onnx_latency import measure_latency

    # The table that a limit on the latency needs is what is measured here.
    budget = recipe.budget.model_copy(update={"latency": None})
    inputs = load_inputs(recipe.model_copy(update={"export": (), "budget": budget}))
    table = measure_latency(
        inputs.model,
        inputs.calibration,
        tuple(dict.fromkeys((*recipe.formats, "none"))) if formats is None else formats,
        runtime=runtime,
        batch=batch,
        threads=threads,
        rounds=rounds,
        mixes=mixes,
        near=near,
    )
    write_latencies(table, output)
    return table


def write_latencies(table: LatencyTable, path: str | Path) -> None:
    """Write a latency table as CSV, as `allocation.latency.read_latencies` reads it.

    The columns `stderr` (milliseconds), `alone` (milliseconds of the layer as a graph of its own)
    and `operation` are for people.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    what = (
        f"{table.runtime}, batch {table.batch}, {table.threads} threads; {table.mixes} mixes "
        f"predicted within {100 * table.misfit:.1f} % (root mean square)"
    )
    fixed = [f"{table.fixed:.6f}", f"{table.fixed_stderr:.6f}"]
    writer.writerow([FIXED, "", "", *fixed, "", what])
    for row in table.rows:
        numbers = [f"{x:.6f}" for x in (row.milliseconds, row.stderr, row.alone)]
        writer.writerow([row.layer, row.shape, row.format, *numbers, row.operation])
    write_text_atomic(Path(path), text.getvalue())


def _recipe_of(source: str) -> tuple[Recipe, dict[str, str] | None]:
    """Return the recipe and, of a run folder, the mix that was chosen in it."""
    folder = Path(source)
    if not folder.is_dir():
        return load_recipe(source), None
    run = RunFolder(folder)
    if not run.recipe.exists():
        raise InputError(f"{folder} holds no recipe.yaml: name a run folder, or a recipe.")
    near = run.read_allocation().layers if run.allocation.exists() else None
    return run.read_recipe(), near
