"""`hawqkit probe`: the sensitivities alone."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import output_folder_option, recipe_argument, run_folder, set_option


@click.command()
@recipe_argument
@output_folder_option
@set_option
def probe(recipe: str, output: Path | None, overrides: tuple[str, ...]) -> None:
    """Measure the sensitivities of RECIPE's model and write them to a run folder.

    `hawqkit allocate` chooses from there, as often as you like; `hawqkit run` goes on from there.
    """
    from hawqkit.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    from hawqkit import pipeline  # imports torch: only when the recipe is sound
    from hawqkit.pipeline.progress import speaker

    folder = run_folder(recipe, output)
    pipeline.run_probe(checked, folder)
    speaker().print(f"written to {folder}; choose with: hawqkit allocate {folder}")
