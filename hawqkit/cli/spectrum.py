"""`hawqkit spectrum`: eigenvalues, rank and degeneracy, whole and layer by layer."""

from __future__ import annotations

from pathlib import Path

import click

from hawqkit.cli.options import output_folder_option, run_folder, set_option


@click.command()
@click.argument("recipe", metavar="RECIPE_OR_RUN")
@output_folder_option
@set_option
def spectrum(recipe: str, output: Path | None, overrides: tuple[str, ...]) -> None:
    """Measure the spectrum of the loss's curvature for RECIPE's model, or for that of a run.

    What is measured stands in the recipe's section `spectrum`; without one, the defaults hold. A
    run's records stay in its folder. Killed or interrupted, the same command goes on where it
    stopped.
    """
    from hawqkit.errors import InputError
    from hawqkit.recipe import load_recipe

    folder = Path(recipe)
    if not folder.is_dir():
        checked = load_recipe(recipe, overrides)
        folder = run_folder(recipe, output)
    elif (folder / "recipe.yaml").is_file():
        checked = load_recipe(folder / "recipe.yaml", overrides)
        folder = folder if output is None else output
    else:
        raise InputError(
            f"{folder}: no run folder (it has no recipe.yaml); give a recipe, or the folder that "
            "`hawqkit run`, `hawqkit probe` or `hawqkit spectrum` wrote."
        )
    from hawqkit import pipeline  # imports torch: only when the recipe is sound
    from hawqkit.pipeline.folder import RunFolder
    from hawqkit.pipeline.progress import is_main, speaker

    pipeline.run_spectrum(checked, folder)
    if not is_main():
        return
    from hawqkit.report import spectrum_tables

    found = RunFolder(folder).read_spectrum()
    for table in spectrum_tables(found) if found is not None else ():
        speaker().print(table)
    speaker().print(f"written to {folder}; look again with: hawqkit show {folder}")
