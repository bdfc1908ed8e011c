"""Which query rows of a layer a cut computes on the side: what surgery builds and what the plan reckons with is read off here.

Legend: S tokens of the bucket at the cut, m text tokens of the bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tmc_export.graphs._contract import Attention, TextEmbeds
from tmc_export.plan.types import CutPlan

__all__ = ["ROW_BLOCK", "handed_rows", "is_sum", "rows_computed", "swept", "text_places"]

ROW_BLOCK = 64
"""Query rows computed at once where there are more: so many rows of the map, and not the map, are in memory."""


def is_sum(need: Attention) -> bool:
    """Whether a need is a sum over several rows."""
    return need.rows in ("all", "visual") or (need.row_sum and need.rows in ("text", "window"))


def swept(needs: Sequence[Attention]) -> tuple[Attention, ...]:
    """Return the needs that one pass over all S rows serves: sums over all or over the visual rows, and then those over the text rows too.

    Everything else picks its own few rows.
    """
    wide = any(n.rows in ("all", "visual") for n in needs)
    return tuple(n for n in needs if wide and is_sum(n) and n.rows != "window")


def rows_computed(needs: Sequence[Attention], tokens: int, text: int) -> int:
    """Return how many query rows are multiplied with every key for these needs of one layer; `tokens` is S and `text` is m."""
    together = swept(needs)
    picked = {(n.rows, n.window if n.rows == "window" else 0) for n in needs if n not in together}
    return (tokens if together else 0) + sum({"last": 1, "text": text}.get(rows, window) for rows, window in picked)


def handed_rows(needs: Sequence[Attention]) -> Literal["last", "all"]:
    """Which query rows a block must hand out for these needs of its last layer."""
    return "last" if all(n.rows == "last" for n in needs) else "all"


def text_places(cut: CutPlan) -> int:
    """Return m where a stage of the cut reads the text tokens one by one (their states, or rows that are theirs alone), else 0."""
    picked = [n for layer in ("previous", "next") for n in _apart(cut, layer) if n.rows == "text"]
    embeds = any(isinstance(n, TextEmbeds) for s in cut.stages for n in s.stage.needs)
    return cut.tokens_in - cut.visual_in if picked or embeds else 0


def _apart(cut: CutPlan, layer: Literal["previous", "next"]) -> tuple[Attention, ...]:
    needs = cut.scored(layer)
    together = swept(needs)
    return tuple(n for n in needs if n not in together)
