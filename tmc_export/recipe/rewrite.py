"""A copy of a recipe file with some values changed; comments and order stay."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from tmc_export.core.errors import RecipeError
from tmc_export.recipe._shipped import is_path
from tmc_export.recipe.load import load_recipe
from tmc_export.recipe.recipe import Recipe

__all__ = ["write_fitted", "write_kept"]

_WIDTH = 1 << 20
_DATA = ("images", "prompts")
"""Keys of `quantize.calibration` that hold paths."""
_Values = Sequence[tuple[tuple[str | int, ...], JsonValue]]
"""Path into the file → its new value."""


def write_fitted(recipe: Recipe, entry: int, at: str, options: Mapping[str, JsonValue], target: Path) -> None:
    """Write the recipe's file anew with an entry's site and options changed; paths in it are made to start from the new place.

    The new file is read back before it takes its place; on any error `target` is as before.

    Args:
        recipe: read from a file, without `--set`.
        entry: index in `compress`.
        at: the site.
        options: the options to change or add.
        target: the file to write; one that is there is replaced.

    Raises:
        RecipeError: the recipe has no file, or what was written does not read back as wanted.
        OSError: the file cannot be written.
    """
    values = [(("compress", entry, key), value) for key, value in {"at": at, **options}.items()]
    _write(recipe, values, recipe.with_entry(entry, at, options), target, f"write {dict(options)} at {at} by hand")


def write_kept(recipe: Recipe, keep: Mapping[str, Sequence[str]], target: Path) -> None:
    """Write the recipe's file anew with other words in the `keep` of some parts; as `write_fitted`.

    Args:
        recipe: read from a file, without `--set`.
        keep: part → all of its words.
        target: the file to write; one that is there is replaced.

    Raises:
        RecipeError: the recipe has no file, or what was written does not read back as wanted.
        OSError: the file cannot be written.
    """
    values: list[tuple[tuple[str | int, ...], JsonValue]] = [(("quantize", part, "keep"), list(words)) for part, words in keep.items()]
    said = "; ".join(f"quantize.{part}.keep: [{', '.join(words)}]" for part, words in keep.items())
    _write(recipe, values, recipe.with_keep(keep), target, f"write {said} by hand")


def _write(recipe: Recipe, values: _Values, want: Recipe, target: Path, fix: str) -> None:
    if recipe.path is None:
        raise RecipeError("the recipe was made in Python and has no file to copy; change it there")
    target = Path(os.path.realpath(target))
    text = _changed(recipe, values, target.parent)
    handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=".yaml", dir=target.parent)
    part = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(part, stat.S_IMODE(recipe.path.stat().st_mode))
        if _meaning(load_recipe(part)) != _meaning(want):
            raise RecipeError(f"{target}: the copy would say something else than was fitted; {fix}")
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _meaning(recipe: Recipe) -> tuple[object, ...]:
    """What a recipe says, wherever it lies: values, and the files that its paths lead to."""
    said = recipe.model_dump(mode="json")
    found: list[object] = [recipe.model_folder() or said["model"]["source"]]
    said["model"]["source"] = None
    for index, entry in enumerate(said["compress"]):
        if entry["weights"] is not None:
            entry["weights"]["file"] = None
            found.append(recipe.weights_file(index))
    for key in _DATA if said["quantize"]["calibration"] is not None else ():
        written = said["quantize"]["calibration"][key]
        found.append(None if written is None else os.path.realpath(recipe.folder / Path(written).expanduser()))
        said["quantize"]["calibration"][key] = None
    if is_path(recipe.target.device):
        found.append(os.path.realpath(recipe.folder / recipe.target.device))
        said["target"]["device"] = None
    return (said, *found)


def _changed(recipe: Recipe, values: _Values, folder: Path) -> str:
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedSeq

    yaml = YAML(typ="rt")
    yaml.width = _WIDTH
    yaml.preserve_quotes = True
    yaml.indent(mapping=2, sequence=4, offset=2)
    path = Path(str(recipe.path))
    data: Any = yaml.load(path.read_text("utf-8-sig"))
    for (*holders, key), value in values:
        holder = data
        for step in holders:
            holder = holder[step]
        if isinstance(value, list):
            items = CommentedSeq(value)
            items.fa.set_flow_style()
            holder[key] = items
        else:
            holder[key] = value
    if folder != recipe.folder:
        _move(recipe, data, folder)
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def _move(recipe: Recipe, data: Any, folder: Path) -> None:
    """Let relative paths start from another folder."""

    def moved(written: str) -> str:
        return written if written.startswith(("/", "~")) else os.path.relpath(recipe.folder / written, folder)

    if recipe.model_folder() is not None:
        source = moved(recipe.model.source)
        data["model"]["source"] = source if source.startswith((".", "/", "~")) else f"./{source}"
    for index, entry in enumerate(recipe.compress):
        if entry.weights is not None and entry.weights.file is not None:
            data["compress"][index]["weights"]["file"] = moved(entry.weights.file)
    calibration = recipe.quantize.calibration
    for key in _DATA if calibration is not None else ():
        if (written := getattr(calibration, key)) is not None:
            data["quantize"]["calibration"][key] = moved(written)
    if is_path(recipe.target.device):
        device = moved(recipe.target.device)
        data["target"]["device"] = device if "/" in device else f"./{device}"
