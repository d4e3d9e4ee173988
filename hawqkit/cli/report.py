"""`hawqkit report`: the report of a run."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command()
@run_argument
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write.  [default: RUN/report.html]",
)
def report(folder: Path, output: Path | None) -> None:
    """Write the report of RUN as one HTML file; needs no torch and no network."""
    from hawqkit import pipeline

    written = folder / "report.html" if output is None else output
    pipeline.report_run(folder, written)
    click.echo(f"written to {written}")
