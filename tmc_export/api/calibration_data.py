"""The user's pictures and questions that calibration runs on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tmc_export.core.errors import RecipeError
from tmc_export.recipe import Recipe

__all__ = ["Sample", "digest_of", "read_samples", "samples_of"]

_PICTURES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        prompt: its text.
        images: files, in order.
        place: where it was read, for messages.
    """

    prompt: str
    images: tuple[Path, ...]
    place: str


def read_samples(prompts: Path, images: Path | None, count: int, pictures: int) -> list[Sample]:
    """Read samples.

    Args:
        prompts: one JSON object a line: `{"prompt": "…"}`, or with its pictures `{"prompt": "…", "images": ["a.png"]}`.
        images: folder of the pictures. Lines without pictures take its files in turn, sorted by name.
        count: samples at most; lines are taken in order.
        pictures: pictures that the bundle takes; 0: questions come without.

    Raises:
        RecipeError: a line or a picture cannot be used, or there is none.
    """
    try:
        lines = prompts.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"quantize.calibration.prompts: cannot read {prompts}: {error}") from error
    files = _pictures(images) if pictures and images is not None else []
    found: list[Sample] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(found) == count:
            break
        place = f"{prompts}:{number}"
        prompt, names = _line(line, place)
        if len(names) > pictures:
            raise RecipeError(f"{place}: {len(names)} images, the recipe's inputs.images is {pictures}; give no more")
        chosen = [_inside(images, name, place) for name in names]
        if not names and files:
            chosen = [files[len(found) % len(files)]]
        found.append(Sample(prompt, tuple(chosen), place))
    if not found:
        raise RecipeError(f'quantize.calibration.prompts: {prompts} has no line; write {{"prompt": "…"}} lines')
    return found


def samples_of(recipe: Recipe) -> list[Sample]:
    """Read the questions and pictures that a recipe is calibrated on; none where nothing needs them.

    Raises:
        RecipeError: they cannot be read.
    """
    given = recipe.quantize.calibration
    if given is None:
        return []
    images = None if given.images is None else _place(recipe, given.images)
    return read_samples(_place(recipe, given.prompts), images, given.samples, recipe.inputs.images)


def _place(recipe: Recipe, written: str) -> Path:
    return (recipe.folder / Path(written).expanduser()).resolve()


def digest_of(samples: Sequence[Sample]) -> str:
    """sha256 of what the samples say and show, in order; "" of none."""
    if not samples:
        return ""
    total = hashlib.sha256()
    for sample in samples:
        total.update(hashlib.sha256(sample.prompt.encode()).digest())
        for path in sample.images:
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def _pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RecipeError(f"quantize.calibration.images: {folder} is no folder; name one that holds pictures")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and p.is_file())
    if not found:
        raise RecipeError(f"quantize.calibration.images: {folder} holds no picture ({', '.join(_PICTURES)})")
    return found


def _line(line: str, place: str) -> tuple[str, list[str]]:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise RecipeError(f'{place}: not JSON ({error}); write {{"prompt": "…"}}') from error
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str) or not value["prompt"]:
        raise RecipeError(f'{place}: a line needs a text "prompt", got {line[:60]}')
    odd = sorted(set(value) - {"prompt", "images"})
    names = value.get("images", [])
    if odd or not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
        wrong = f"unknown key '{odd[0]}'" if odd else f"images is {json.dumps(names)[:60]}, not a list of names"
        raise RecipeError(f'{place}: {wrong}; a line is {{"prompt": "…", "images": ["a.png"]}}')
    return value["prompt"], names


def _inside(folder: Path | None, name: str, place: str) -> Path:
    if folder is None:
        raise RecipeError(f"{place}: names the picture '{name}', and quantize.calibration.images names no folder; add it")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{place}: the picture '{name}' lies outside of {folder}; put it there")
    if not path.is_file():
        raise RecipeError(f"{place}: {path} does not exist")
    return path
