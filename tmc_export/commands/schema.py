"""`tmc-export schema`: the JSON Schema of recipes and devices, for editors and checkers."""

from __future__ import annotations

import json

import click

__all__ = ["command"]


@click.command()
@click.argument("kind", type=click.Choice(["recipe", "device"]), default="recipe")
def command(kind: str) -> None:
    """Print the JSON Schema of a recipe (the default) or of a device file."""
    from tmc_export.recipe import device_schema, recipe_schema

    click.echo(json.dumps(recipe_schema() if kind == "recipe" else device_schema(), indent=2, ensure_ascii=False))
