"""What stages must find: the tokens that their entry's earlier stage left, and tokens that a decoder layer has seen."""

from __future__ import annotations

from collections.abc import Sequence

from tmc_export.core.errors import LegalityError
from tmc_export.graphs._contract import Attention, Features, Keys, Need, Site, Stage
from tmc_export.plan.types import Plan, StagePlan
from tmc_export.recipe import Recipe

__all__ = ["broken_tie", "check_seen", "check_unseen"]


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


def check_unseen(recipe: Recipe, plan: Plan) -> None:
    """Refuse scores and KV rows of tokens that a stage of the same cut made.

    Raises:
        LegalityError: at the line of the stage that asks.
    """
    for cut in plan.cuts:
        for number, stage in enumerate(cut.stages):
            made = next((s for s in reversed(cut.stages[:number]) if s.after.synthetic), None)
            if made is not None and (stage.after.kv_rows or any(isinstance(n, Attention) for n in stage.stage.needs)):
                wants = "names KV rows" if stage.after.kv_rows else "asks for attention"
                raise LegalityError(
                    f"{recipe.origin(('compress', stage.entry, 'at'))}: method '{stage.method}' at {stage.stage.at} {wants}, and "
                    f"'{made.method}' made {made.after.synthetic} tokens at the same cut, which no layer has seen; put '{stage.method}' "
                    "first, or at another layer"
                )


def check_seen(recipe: Recipe, plan: Plan) -> None:
    """Refuse what an encoder layer computed for other tokens than arrive: attention, keys or features from before a cut.

    Raises:
        LegalityError: at the line of the stage that asks.
    """
    for vision in plan.vision:
        layers = vision.facts.encoder.layers
        for number, stage in enumerate(vision.stages):
            found = [moment for n in stage.stage.needs if (moment := _computed(n, stage.stage.at, layers)) is not None]
            for earlier in vision.stages[:number] if found else ():
                if _changes(earlier) and _moment(earlier.stage.at, layers) > min(found):
                    raise LegalityError(
                        f"{recipe.origin(('compress', stage.entry, 'at'))}: method '{stage.method}' at {stage.stage.at} asks for what an "
                        f"encoder layer computed, and '{earlier.method}' at {earlier.stage.at} left {earlier.after.tokens} of its "
                        f"{earlier.before.tokens} tokens since; put a whole layer between them, or choose one of the two"
                    )


def _moment(site: Site, layers: int) -> tuple[int, int]:
    """When a stage runs: (layer, 0) before a layer, (layer, 2) between its attention (1) and its feed-forward (3)."""
    if site.part == "input":
        return -1, 0
    return layers if site.part == "projector" or site.layer is None else site.layer, 2 if site.point == "mid" else 0


def _computed(need: Need, site: Site, layers: int) -> tuple[int, int] | None:
    """When a need was computed; None for what is computed at the stage itself."""
    before, step = _moment(site, layers)
    if isinstance(need, Features):
        return (need.layer if need.layer >= 0 else before - 1), 3
    if isinstance(need, (Attention, Keys)) and need.layer == "previous":
        return (before if step else before - 1), 1
    return None
