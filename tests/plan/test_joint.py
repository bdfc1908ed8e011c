"""A joint budget: one picture may use it up, and the slots behind the cut have room for that in every turn."""

from __future__ import annotations

from pathlib import Path

import pytest

from tmc_export.plan.make import make_plan
from tmc_export.plan.source import fetch, read_model_files
from tmc_export.recipe import load_recipe

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"


@pytest.mark.parametrize(
    ("scope", "tokens", "capacity"), [("joint", 2 * 98 + 32, 2 * 196 + 32 + 16), ("image", 2 * 98 + 32, 2 * 98 + 32 + 16)]
)
def test_slots_behind_a_cut(scope: str, tokens: int, capacity: int) -> None:
    recipe = load_recipe(QUICKSTART, ["inputs.images=2", f"compress.0.scope={scope}"])
    plan, _ = make_plan(recipe, read_model_files(fetch(recipe, weights=False)))
    assert (plan.blocks[1].tokens, plan.blocks[1].capacity) == (tokens, capacity)
