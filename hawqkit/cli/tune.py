"""`hawqkit tune`: train the network with a run's allocation in it."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument, set_option


@click.command()
@run_argument
@set_option
def tune(folder: Path, overrides: tuple[str, ...]) -> None:
    """Train the model of RUN so that it predicts well in the formats that were allocated.

    How stands in the recipe's section `tune`; `--set tune.epochs=3` changes it. Afterwards
    `hawqkit validate` measures the tuned model too, and `hawqkit export` writes its weights. Killed
    or interrupted, the same command goes on where it stopped.
    """
    from hawqkit import pipeline
    from hawqkit.pipeline.folder import RunFolder
    from hawqkit.pipeline.progress import is_main, speaker
    from hawqkit.report import tuning_tables

    record = pipeline.tune_run(folder, overrides)
    if not is_main():
        return
    run = RunFolder(folder)
    for table in tuning_tables(run.read_allocation(), record):
        speaker().print(table)
    speaker().print(
        f"written to {run.tuning}; go on with: hawqkit validate {folder}, hawqkit export {folder}"
    )
