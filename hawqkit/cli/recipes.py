"""`hawqkit recipes`: the recipes that come with the package."""

from __future__ import annotations

import click


@click.command()
@click.argument("name", required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of recipes, for editors.")
def recipes(name: str | None, schema: bool) -> None:
    """List the shipped recipes, or print the one called NAME to begin your own with."""
    from hawqkit.errors import InputError, did_you_mean
    from hawqkit.recipe import schema_text, shipped_recipes

    if schema:
        click.echo(schema_text(), nl=False)
        return
    shipped = shipped_recipes()
    if name is None:
        width = max((len(recipe.name) for recipe in shipped), default=0)
        for recipe in shipped:
            click.echo(f"{recipe.name:{width}}  {recipe.about}\n{'':{width}}  {recipe.path}")
        return
    found = next((recipe for recipe in shipped if recipe.name == name), None)
    if found is None:
        names = [recipe.name for recipe in shipped]
        raise InputError(
            f"no recipe called {name!r} comes with hawqkit; known: {', '.join(names)}."
            + did_you_mean(name, names)
        )
    click.echo(found.path.read_text(), nl=False)
