"""`tmc-export recipes`: the ready-made recipes, each with the command that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tmc_export.recipe import Recipe

__all__ = ["command"]


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def command(name: str | None, as_json: bool) -> None:
    """List the recipes, or show one. NAME is a shipped recipe or a recipe file."""
    import json

    from tmc_export.recipe import find_recipe, load_recipe, recipes

    if name is not None:
        recipe = load_recipe(name)
        text = json.dumps(recipe.model_dump(mode="json"), indent=2, ensure_ascii=False)
        click.echo(text if as_json else find_recipe(name).read_text(encoding="utf-8-sig").rstrip())
        return
    known = [load_recipe(each) for each in recipes()]
    if as_json:
        click.echo(json.dumps([_facts(recipe) for recipe in known], indent=2, ensure_ascii=False))
        return
    width = max((len(recipe.name) for recipe in known), default=0)
    for recipe in known:
        click.echo(f"{recipe.name:<{width}}  {recipe.target.device:<20}  {recipe.target.runtime:<12}  {_plan(recipe)}")


def _facts(recipe: Recipe) -> dict[str, object]:
    return {
        "name": recipe.name,
        "path": str(recipe.path),
        "model": recipe.model.source,
        "device": recipe.target.device,
        "runtime": recipe.target.runtime,
        "compress": [{"at": entry.at, "method": entry.method} for entry in recipe.compress],
    }


def _plan(recipe: Recipe) -> str:
    return ", ".join(f"{entry.method} at {entry.at}" for entry in recipe.compress) or "uncompressed"
