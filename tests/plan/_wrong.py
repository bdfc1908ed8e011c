"""A recipe that `plan` must refuse, and the refusal judged."""

from __future__ import annotations

from typing import Any

import pytest

from tmc_export.core.errors import LegalityError, TmcError
from tmc_export.families._contract import ModelFiles
from tmc_export.plan.make import make_plan
from tmc_export.recipe import Recipe

__all__ = ["Wrong", "check_refusal", "refused"]

Wrong = tuple[str, tuple[str, ...], dict[str, Any], str, tuple[str, ...]]
"""Name, entries, other lines, place, what it must say."""


def refused(recipe: Recipe, files: ModelFiles) -> TmcError:
    with pytest.raises(TmcError) as caught:
        make_plan(recipe, files)
    return caught.value


def check_refusal(recipe: Recipe, files: ModelFiles, place: str, says: tuple[str, ...]) -> None:
    """Fail unless a recipe is refused on one line that opens with its file and the place and says all this."""
    error = refused(recipe, files)
    text = str(error)
    assert "\n" not in text
    if place:
        assert isinstance(error, LegalityError) and error.exit_code == 3
        assert text.startswith(f"{recipe.origin().file}:{place}: "), text
    assert all(part in text for part in says), text
