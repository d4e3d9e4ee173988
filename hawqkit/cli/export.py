"""`hawqkit export`: write a run's allocation for a quantizer."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command()
@run_argument
@click.option("--target", metavar="NAME", required=True, help="See `hawqkit targets`.")
@click.option(
    "-o",
    "--output",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to write.  [default: RUN/exports/NAME]",
)
def export(folder: Path, target: str, output: Path | None) -> None:
    """Write the allocation of RUN in the form that a target reads."""
    from hawqkit import pipeline

    written = folder / "exports" / target if output is None else output
    pipeline.export_run(folder, target, written)
    click.echo(f"written to {written}")
