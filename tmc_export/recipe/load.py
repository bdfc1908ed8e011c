"""From a name or a path to a checked `Recipe`, and the JSON Schema of what may be written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import JsonValue

from tmc_export.core.errors import RecipeError
from tmc_export.recipe._overrides import apply_overrides
from tmc_export.recipe._problems import check_version, validate
from tmc_export.recipe._shipped import find_shipped, is_path, shipped
from tmc_export.recipe._yaml import read_yaml
from tmc_export.recipe.device import find_device
from tmc_export.recipe.recipe import Recipe

__all__ = ["find_recipe", "load_recipe", "recipe_schema", "recipes"]

VERSION = 1
"""The schema version this code reads."""


def find_recipe(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file of a recipe: a path as it is, or the shipped recipe of that name.

    Raises:
        RecipeError: no shipped recipe has that name; lists them and the nearest one.
    """
    return find_shipped("recipe", name_or_path)


def recipes() -> list[str]:
    """Return the names of the shipped recipes, sorted."""
    return sorted(shipped("recipe"))


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a recipe file, or the name of a shipped recipe.
        overrides: `--set` arguments such as `"compress.0.keep=25%"`, applied in turn before anything is checked.

    Raises:
        RecipeError: one line per problem: place, value received, what is allowed, the nearest name.
    """
    file = find_recipe(path)
    data, origins = read_yaml(file, "recipe")
    data, origins = apply_overrides(data, origins, overrides)
    check_version("recipe", VERSION, data, origins)
    recipe = validate(Recipe, data, origins)
    recipe._origins = origins
    recipe._path = file.resolve()
    _check_device(recipe)
    return recipe


def _check_device(recipe: Recipe) -> None:
    place = recipe.origin(("target", "device"))
    try:
        file = find_device(recipe.target.device, recipe.folder)
    except RecipeError as error:
        raise RecipeError(f"{place}: target.device: {error}") from error
    if is_path(recipe.target.device) and not file.is_file():
        raise RecipeError(f"{place}: target.device: no such device file: {recipe.target.device}; it is relative to the recipe file")


def recipe_schema() -> dict[str, JsonValue]:
    """Return the JSON Schema of a recipe, for editors and for `tmc-export schema recipe`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
