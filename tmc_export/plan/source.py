"""The checkpoint a recipe names: its folder, and the small JSON files a plan is made from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from tmc_export.core.errors import ModelError
from tmc_export.core.lazy import require
from tmc_export.families._contract import ModelFiles
from tmc_export.recipe.recipe import Recipe

__all__ = ["SMALL_FILES", "fetch", "fetch_source", "read_model_files"]

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What a plan and the runtime need of a hub repository; weights are fetched by `build` only."""


def fetch(recipe: Recipe, *, weights: bool) -> Path:
    """Return the model's folder; a hub id is fetched (or found in the cache, under `HF_HUB_OFFLINE`).

    Args:
        recipe: names a folder, or a hub id and revision.
        weights: also fetch safetensors files.

    Raises:
        ModelError: the folder does not exist, or the hub has no such model.
    """
    return fetch_source(recipe, recipe.model.source, f"{recipe.origin(('model', 'source'))}: model.source", recipe.model.revision, weights)


def fetch_source(recipe: Recipe, source: str, place: str, revision: str | None, weights: bool) -> Path:
    """Return the folder of a checkpoint that a recipe names; see `fetch`.

    Args:
        recipe: relative folders start from it.
        source: a folder or a hub id.
        place: begins every message.
        revision: of a hub id.
        weights: also fetch safetensors files.
    """
    folder = recipe.source_folder(source)
    if folder is not None:
        if not (folder / "config.json").is_file():
            what = "holds no config.json" if folder.is_dir() else "does not exist"
            raise ModelError(f"{place}: the folder '{source}' ({folder}) {what}; name a Hugging Face model folder or a hub id")
        return folder
    hub = require("huggingface_hub", extra="export", purpose=f"look up the model '{source}'")
    patterns = [*SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(hub.snapshot_download(source, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub client raises errors of several libraries; every one of them means the same to the user
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise ModelError(
            f"{place}: '{source}' is no folder beside the recipe and could not be fetched from the hub{offline}: {reason}"
        ) from error


def read_model_files(folder: Path) -> ModelFiles:
    """Read the JSON files of a model folder; an absent one is empty.

    Raises:
        ModelError: a file is not JSON, or config.json is no mapping.
    """
    return ModelFiles(
        config=_json(folder / "config.json"),
        generation=_json(folder / "generation_config.json"),
        processor=_json(folder / "processor_config.json"),
        preprocessor=_json(folder / "preprocessor_config.json"),
        tokenizer=_json(folder / "tokenizer_config.json"),
    )


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}; fetch the model again") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} holds a {type(data).__name__}, not a mapping; fetch the model again")
    return data
