"""Stages that know tokens one by one from an earlier stage of their entry: no other entry may change the tokens in between."""

from __future__ import annotations

from collections.abc import Sequence

from tmc_export.graphs._contract import Stage
from tmc_export.plan.types import StagePlan

__all__ = ["broken_tie"]


def broken_tie(stage: Stage, entry: int, run: Sequence[StagePlan]) -> str | None:
    """Say why a stage with `Stage.tied` cannot work behind the stages that ran, or return None.

    Args:
        stage: of the recipe entry `entry`.
        entry: its number.
        run: all stages before it, of all entries, in the order they run.

    Returns:
        What changes the tokens since the entry's own stage before this one, and the fix.
    """
    start = max((i for i, s in enumerate(run) if s.entry == entry), default=len(run))
    if not stage.tied or start == len(run):
        return None
    first, left = run[start].stage.at, run[start].after
    for between in run[start + 1 :]:
        if _changes(between):
            return (
                f"must find the {left.tokens - left.class_tokens} tokens that it left at {first}, and '{between.method}' at "
                f"{between.stage.at} changes them in between; put '{between.method}' before {first} or behind {stage.at}, or choose one of "
                "the two"
            )
    return None


def _changes(stage: StagePlan) -> bool:
    """A look, which keeps everything, changes nothing."""
    return stage.before.segments != stage.after.segments or stage.stage.at.point == "replace"
