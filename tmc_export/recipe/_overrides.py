"""`--set compress.0.keep=25%`: changes to a recipe's data before it is checked, so that they are checked like the file."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from pydantic import JsonValue

from tmc_export.core.errors import RecipeError
from tmc_export.recipe._origin import Origin, Origins, Path, printable
from tmc_export.recipe._problems import dotted, shown_value
from tmc_export.recipe._yaml import parse_yaml

__all__ = ["apply_overrides"]


def apply_overrides(data: dict[str, JsonValue], origins: Origins, overrides: Sequence[str]) -> tuple[dict[str, JsonValue], Origins]:
    """Return a copy of `data` with every `key=value` applied in turn, and the places that go with it.

    A value is read as YAML (`25%`, `2`, `[336, 336]`, `null`). A missing mapping on the way is made; an item may be appended to
    a list with the next free index.

    Raises:
        RecipeError: an argument without `=`, or a key that leads through a value that holds no keys.
    """
    data = copy.deepcopy(data)
    for override in overrides:
        shown = f"--set {printable(override)}"
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise RecipeError(f"{shown}: write it as key=value with dots between keys, for example --set inputs.images=2")
        value, _ = parse_yaml(text, shown)
        path = _put(data, parts, value, shown)
        origins = origins.replaced(path, Origin(shown))
    return data, origins


def _put(data: dict[str, JsonValue], parts: Sequence[str], value: JsonValue, shown: str) -> Path:
    holder: JsonValue = data
    path: Path = ()
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(holder, dict):
            if last:
                holder[part] = value
            elif holder.get(part) is None:
                holder[part] = {}
            path, holder = (*path, part), holder[part]
        elif isinstance(holder, list):
            index = _index(holder, part, path, shown)
            if index == len(holder):
                holder.append(value if last else {})
            elif last:
                holder[index] = value
            path, holder = (*path, index), holder[index]
        else:
            raise RecipeError(f"{shown}: {dotted(path)} is {shown_value(holder)} and holds no key '{part}'")
    return path


def _index(holder: list[JsonValue], part: str, path: Path, shown: str) -> int:
    if part.isascii() and part.isdigit() and int(part) <= len(holder):
        return int(part)
    raise RecipeError(f"{shown}: {dotted(path)} is a list of {len(holder)}; use a number from 0 to {len(holder)}, got '{part}'")
