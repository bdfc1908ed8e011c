"""The YAML files that come with the package: recipes and devices, by name."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

from tmc_export.core.errors import RecipeError
from tmc_export.core.registry import nearest
from tmc_export.recipe._origin import printable

__all__ = ["find_shipped", "is_path", "shipped"]

_LISTED = 12
"""Names that still fit on a message's line."""


def shipped(kind: str) -> dict[str, Path]:
    """Return name → file of what is shipped; `kind` is `"recipe"` or `"device"`."""
    folder = Path(str(files("tmc_export").joinpath(f"{kind}s")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def is_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is meant as a path: it has a separator or a YAML suffix."""
    text = os.fspath(name)
    return not isinstance(name, str) or "/" in text or os.sep in text or text.endswith((".yaml", ".yml")) or text in (".", "..")


def find_shipped(kind: str, name: str | os.PathLike[str], folder: Path | None = None) -> Path:
    """Return the file `name` means: a path (relative to `folder`), else a shipped file of that name, else a file that exists.

    Raises:
        RecipeError: nothing of that name; lists what is shipped and the nearest name.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if folder is not None:
        path = folder / path
    if is_path(name):
        return path
    known = shipped(kind)
    if text in known:
        return known[text]
    if text and os.path.exists(path):  # unlike Path.exists, never raises
        return path
    names = f"shipped: {', '.join(known) or 'none'}" if len(known) <= _LISTED else f"list the {len(known)} shipped: tmc-export {kind}s"
    raise RecipeError(f"no {kind} is named '{printable(text)}'{nearest(text, known)}; {names}; or give a path to a .yaml file")
