"""`hawqkit validate`: measure a run's allocation."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command()
@run_argument
def validate(folder: Path) -> None:
    """Measure the allocation of RUN and its baselines on data that the choice never saw."""
    from hawqkit import pipeline
    from hawqkit.pipeline.folder import RunFolder
    from hawqkit.pipeline.progress import speaker
    from hawqkit.report import result_tables

    validation = pipeline.validate_run(folder)
    for table in result_tables(RunFolder(folder).read_allocation(), validation):
        speaker().print(table)
