"""`hawqkit show`: a run as tables in the terminal."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import run_argument


@click.command()
@run_argument
@click.option("--full", is_flag=True, help="Every layer, not the first and last ones alone.")
def show(folder: Path, full: bool) -> None:
    """Show RUN: the result against the baselines, bits and sensitivities layer by layer."""
    from rich.console import Console

    from hawqkit import pipeline

    pipeline.show_run(folder, full, Console(emoji=False))
