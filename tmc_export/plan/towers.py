"""Text towers: the text encoders that stages ask for (`TextTower`), read from their config.json alone.

A tower is the text side of a CLIP checkpoint: `CLIPModel` or `CLIPTextModelWithProjection`. It is run once for the question of a turn that
brings pictures, and its projected embedding is the input `text.<n>` of every graph with a stage that asked for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmc_export.core.errors import LegalityError, ModelError
from tmc_export.graphs._contract import TextTower
from tmc_export.plan.entries import Entry
from tmc_export.plan.source import fetch_source
from tmc_export.plan.types import Plan, StagePlan, TowerPlan
from tmc_export.recipe.recipe import Recipe

if TYPE_CHECKING:
    from pydantic import JsonValue

__all__ = ["asked_towers", "fetch_towers", "read_towers", "tower_of"]

_KINDS = ("clip", "clip_text_model")
_LEGACY_END = 2
"""What old CLIP configurations call the end token; their models read the embedding at the highest id, the last of the vocabulary."""


def read_towers(recipe: Recipe, entries: Sequence[Entry]) -> tuple[TowerPlan, ...]:
    """Read the numbers of every tower that a stage asks for; stages that name the same source share it.

    Raises:
        ModelError: there is no such checkpoint, or it is no CLIP model with a tokenizer.
        LegalityError: its embedding has another width than a stage takes.
    """
    found: dict[str, TowerPlan] = {}
    for entry in entries:
        for need in dict.fromkeys(n for s in entry.stages for n in s.needs if isinstance(n, TextTower)):
            place = _place(entry, need)
            if need.source not in found:
                found[need.source] = _read(recipe, need.source, len(found), place)
            width = found[need.source].width
            if width != need.width:
                key = next((k for k, v in entry.config if v == need.width and type(v) is int), "its width")
                raise LegalityError(
                    f"{place}: method '{entry.name}' takes a text embedding of {need.width} channels, the tower '{need.source}' gives "
                    f"{width} (projection_dim); write {key}: {width}, or name a tower of {need.width}"
                )
    return tuple(found.values())


def fetch_towers(recipe: Recipe, plan: Plan) -> dict[str, Path]:
    """Return the folder of every tower with its weights, by source.

    Raises:
        ModelError: one cannot be fetched.
    """
    return {t.source: fetch_source(recipe, t.source, f"text tower {t.index}", None, weights=True) for t in plan.towers}


def tower_of(towers: Iterable[TowerPlan], need: TextTower) -> TowerPlan:
    """Return the tower that a need names."""
    return next(t for t in towers if t.source == need.source)


def asked_towers(plan: Plan, stages: Sequence[StagePlan]) -> dict[TextTower, TowerPlan]:
    """Return what some stages ask text towers for, in the towers' order."""
    needs = dict.fromkeys(n for s in stages for n in s.stage.needs if isinstance(n, TextTower))
    return dict(sorted(((n, tower_of(plan.towers, n)) for n in needs), key=lambda item: item[1].index))


def _place(entry: Entry, need: TextTower) -> str:
    """The recipe's line of the option that names the tower; the entry's where that is a default."""
    return entry.origin(next((key for key, value in entry.config if value == need.source), "method"))


def _read(recipe: Recipe, source: str, index: int, place: str) -> TowerPlan:
    folder = fetch_source(recipe, source, f"{place}: text tower", None, weights=False)
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{place}: {folder / 'config.json'} cannot be read as JSON: {error}; fetch the tower again") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in _KINDS:
        raise ModelError(
            f"{place}: the text tower '{source}' is of model_type '{kind}'; built are CLIP's ({', '.join(_KINDS)}): name such a checkpoint"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"{place}: the text tower '{source}' has no tokenizer.json, which the runtime reads; save its tokenizer with transformers "
            "into a copy of the checkpoint"
        )
    text = {**(config.get("text_config") or {}), **(config.get("text_config_dict") or {})} if kind == "clip" else config

    def number(key: str, default: int, of: Mapping[str, JsonValue] = text) -> int:
        value = of.get(key, default)
        if type(value) is not int or value < 1:
            raise ModelError(f"{place}: the text tower '{source}' has {key}: {value!r} in its config.json; it must be 1 or more")
        return value

    vocabulary, end = number("vocab_size", 49408), number("eos_token_id", 49407)
    return TowerPlan(
        index=index,
        source=source,
        width=number("projection_dim", 512, config),
        tokens=number("max_position_embeddings", 77),
        end=vocabulary - 1 if end == _LEGACY_END else end,
        hidden=number("hidden_size", 512),
        layers=number("num_hidden_layers", 12),
        heads=number("num_attention_heads", 8),
        intermediate=number("intermediate_size", 2048),
        vocabulary=vocabulary,
        path=folder,
    )
