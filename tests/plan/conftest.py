"""Recipes on LLaVA-1.5-7B's configuration (`data/`, no weights), with one line changed at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tmc_export.families._contract import ModelFiles
from tmc_export.plan.source import read_model_files
from tmc_export.recipe import Recipe, load_recipe

DATA = Path(__file__).parent / "data" / "llava-1.5-7b"
TINY = Path(__file__).parents[2] / "examples" / "tiny-llava"

Writer = Callable[..., Recipe]


@pytest.fixture(scope="session")
def files() -> ModelFiles:
    return read_model_files(DATA)


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """`write(line5="…", device="…")` → a loaded recipe; lines are numbered as they stand in the file."""

    def make(
        *entries: str,
        model: str = "dtype: float16",
        inputs: str = "images: 1, text_tokens: 128, new_tokens: 256",
        quantize: str = "{}",
        target: str = "device: jetson-agx-orin-64gb, runtime: tensorrt, decode_width: 1",
        source: Path = DATA,
    ) -> Recipe:
        lines = [
            "recipe: 1",
            "name: test",
            f"model: {{source: MODEL, {model}}}",
            f"inputs: {{{inputs}}}",
            f"quantize: {quantize}",
            f"target: {{{target}}}",
            *(["compress:"] if entries else []),
            *(f"  - {{{entry}}}" for entry in entries),
        ]
        (tmp_path / "MODEL").symlink_to(source) if not (tmp_path / "MODEL").exists() else None
        path = tmp_path / "recipe.yaml"
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
        return load_recipe(path)

    return make
