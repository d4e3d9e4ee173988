"""`hawqkit run`: everything that a recipe says."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import output_folder_option, recipe_argument, run_folder, set_option


@click.command()
@recipe_argument
@output_folder_option
@set_option
def run(recipe: str, output: Path | None, overrides: tuple[str, ...]) -> None:
    """Do everything that RECIPE says: probe, allocate, validate, export, report.

    RECIPE is a YAML file or the name of a shipped recipe. Killed or interrupted, the same command
    goes on where it stopped.
    """
    from hawqkit.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    from hawqkit import pipeline  # imports torch: only when the recipe is sound

    pipeline.run(checked, run_folder(recipe, output))
