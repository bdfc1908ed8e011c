"""The recipe's `compress` list with methods looked up, options validated and stages asked for."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from tmc_export.core.errors import LegalityError, RecipeError, TmcError
from tmc_export.core.facts import ModelFacts
from tmc_export.core.registry import nearest
from tmc_export.graphs import METHODS
from tmc_export.graphs._contract import Method, MethodConfig, Site, Stage
from tmc_export.recipe.recipe import Recipe, WeightsSource

__all__ = ["Entry", "read_entries", "read_options"]


@dataclass(frozen=True)
class Entry:
    """One entry of `compress`.

    Attributes:
        index: in the list.
        name, method, config, scope: as the recipe says.
        stages: the cuts it makes.
        weights: where its learned weights come from, as the recipe says; `plan.learned` compares that with what the method declares.
        weights_path: the file that this names on this machine.
        origin: key (or nothing) → its place in the recipe, for messages.
    """

    index: int
    name: str
    method: type[Method]
    config: MethodConfig
    scope: Literal["image", "joint"]
    stages: tuple[Stage, ...]
    weights: WeightsSource | None
    weights_path: Path | None
    origin: Callable[..., str]


def read_entries(recipe: Recipe, facts: ModelFacts) -> tuple[Entry, ...]:
    """Look up and validate every entry.

    Raises:
        RecipeError: an unknown method or option, or a value it may not have.
        LegalityError: a method that refuses this site or model.
    """
    return tuple(_read(recipe, index, facts) for index in range(len(recipe.compress)))


def read_options(recipe: Recipe, index: int) -> MethodConfig:
    """Validate the options of one entry, and nothing else of it.

    Raises:
        RecipeError: an unknown method or option, or a value it may not have.
    """
    written = recipe.compress[index]

    def origin(*keys: str) -> str:
        return str(recipe.origin(("compress", index, *keys)))

    try:
        method = METHODS.get(written.method)
    except TmcError as error:
        raise RecipeError(f"{origin('method')}: {error}") from error
    return _config(method, written.method, dict(written.options), origin)


def _read(recipe: Recipe, index: int, facts: ModelFacts) -> Entry:
    written = recipe.compress[index]

    def origin(*keys: str) -> str:
        return str(recipe.origin(("compress", index, *keys)))

    config = read_options(recipe, index)
    method = METHODS.get(written.method)
    try:
        site = Site.parse(written.at)
    except ValueError as error:
        raise RecipeError(f"{origin('at')}: {error}") from error
    if not {_form(site), str(site)} & set(method.sites):  # decoder.<k>, or one layer alone: decoder.0
        raise LegalityError(f"{origin('at')}: method '{written.method}' cannot act at {written.at}; it acts at: {', '.join(method.sites)}")
    if site.part in ("prefill_end", "step"):
        raise LegalityError(f"{origin('at')}: the site {written.at} is not built yet")
    try:
        stages = tuple(method.stages(site, config, facts))
    except ValueError as error:
        raise LegalityError(f"{origin()}: method '{written.method}' at {written.at}: {error}") from error
    if written.scope == "joint" and any(s.at.part != "decoder" for s in stages):
        raise LegalityError(
            f"{origin('scope')}: scope: joint needs all pictures at once, which only decoder sites see; remove it or move to decoder.<k>"
        )
    return Entry(index, written.method, method, config, written.scope, stages, written.weights, recipe.weights_file(index), origin)


def _config(method: type[Method], name: str, options: dict[str, object], origin: Callable[..., str]) -> MethodConfig:
    try:
        return method.Config.model_validate(options)
    except ValidationError as error:
        allowed = list(method.Config.model_fields)
        lines = []
        for problem in error.errors():
            key = str(problem["loc"][0]) if problem["loc"] else ""
            if problem["type"] == "extra_forbidden":
                hint = nearest(key, allowed)
                lines.append(f"{origin(key)}: method '{name}' has no option '{key}'{hint}; its options are: {', '.join(allowed) or 'none'}")
            elif problem["type"] == "missing":
                lines.append(f"{origin()}: method '{name}' needs the option '{key}'; its options are: {', '.join(allowed)}")
            else:
                message = re.sub(r"^Value error, ", "", problem["msg"])
                lines.append(f"{origin(key) if key else origin()}: {name}.{key or 'options'}: {message}, got {problem['input']!r}")
        raise RecipeError("\n".join(lines)) from error


def _form(site: Site) -> str:
    """A site with its layer as methods list it: `decoder.<k>`, `encoder.<l>.mid`."""
    letter = {"decoder": "k", "step": "k"}.get(site.part, "l")
    layer = None if site.layer is None else f"<{letter}>"
    return ".".join(p for p in (site.part, layer, site.point) if p is not None)
