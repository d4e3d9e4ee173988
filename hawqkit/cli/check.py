"""`hawqkit check`: what a run would do and cost."""

from __future__ import annotations

import click

from hawqkit.cli.options import recipe_argument, set_option


@click.command()
@recipe_argument
@set_option
def check(recipe: str, overrides: tuple[str, ...]) -> None:
    """Resolve everything that RECIPE names, and predict sizes, time and memory.

    Loads the model and runs one micro-batch; writes nothing.
    """
    from hawqkit.recipe import load_recipe

    checked = load_recipe(recipe, overrides)
    from hawqkit import pipeline  # imports torch: only when the recipe is sound
    from hawqkit.pipeline.progress import speaker

    pipeline.print_check(pipeline.check(checked), speaker())
