"""Stages that know tokens by what an earlier stage of their entry found out: nobody may change the tokens in between."""

from __future__ import annotations

from collections.abc import Sequence

from tmc_export.core.errors import LegalityError
from tmc_export.plan.types import Plan, StagePlan
from tmc_export.recipe import Recipe

__all__ = ["changes", "check_tied"]


def check_tied(recipe: Recipe, plan: Plan) -> None:
    """Refuse an entry that changes the tokens between two stages of another one that are tied (`Stage.tied`).

    Raises:
        LegalityError: at the line of the entry in between.
    """
    cuts = [stage for cut in plan.cuts for stage in cut.stages]
    for vision in plan.vision:
        run = [*vision.stages, *cuts]
        for number, stage in enumerate(run):
            if stage.stage.tied:
                _check(recipe, stage, run[:number])


def _check(recipe: Recipe, stage: StagePlan, before: Sequence[StagePlan]) -> None:
    start = max((i for i, s in enumerate(before) if s.entry == stage.entry), default=len(before))
    for between in before[start + 1 :]:
        if changes(between):
            first, second, left = before[start].stage.at, stage.stage.at, before[start].after
            raise LegalityError(
                f"{recipe.origin(('compress', between.entry, 'at'))}: method '{between.method}' at {between.stage.at} changes the tokens "
                f"between {first} and {second}, and '{stage.method}' must find the {left.tokens - left.class_tokens} there that it left; "
                f"put '{between.method}' before {first} or behind {second}, or choose one of the two"
            )


def changes(stage: StagePlan) -> bool:
    """Say whether other tokens leave a stage than arrive; a look, which keeps everything, changes nothing."""
    return stage.before.segments != stage.after.segments or stage.stage.at.point == "replace"
