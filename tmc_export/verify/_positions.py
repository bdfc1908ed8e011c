"""Rotary positions of a turn for the reference, by the model's own `get_rope_index` where it has one.

Legend: T tokens of the turn, r rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.plan.types import VisionPlan
from tmc_export.verify._see import Seen

__all__ = ["rotary_positions"]


def rotary_positions(whole: Any, group: Tensor, plans: Sequence[VisionPlan], seen: Sequence[Seen], start: int) -> tuple[Tensor, int] | None:
    """Return positions `[3, T]` and the position after the turn; None when the model simply counts.

    The prompt is laid out with every picture's full raster, numbered by the model, and the tokens that left the vision stages are picked
    out of it. A picture that still forms a raster is numbered by that raster.

    Args:
        whole: the Hugging Face model.
        group: `[T]` 0 for text, p for a token of picture p.
        plans: per picture, its bucket.
        seen: per picture, its tokens and their origin.
        start: position of the turn's first token.

    Raises:
        ExportError: a token that comes from no place of the picture, in a picture that is no raster any more.
    """
    if not hasattr(whole.model, "get_rope_index"):
        return None
    if not seen:
        return None
    grids, picked, laid = [], [], []
    offset = place = 0
    while place < group.shape[0]:
        picture = int(group[place])
        if not picture:
            laid.append(torch.zeros(1, dtype=torch.int64))
            picked.append(torch.tensor([offset]))
            offset, place = offset + 1, place + 1
            continue
        plan, origin = plans[picture - 1], seen[picture - 1].source[0]
        rows, columns = plan.out_grid or plan.facts.visual_grid
        if plan.out_grid is None and bool((origin < 0).any()):
            raise ExportError(
                "a method made visual tokens that come from no place of the picture; this model's positions need one for each"
            )
        merge = plan.facts.encoder.merge
        grids.append((1, rows * merge, columns * merge))
        laid.append(torch.ones(rows * columns, dtype=torch.int64))
        picked.append(offset + (torch.arange(rows * columns) if plan.out_grid else origin))
        offset, place = offset + rows * columns, place + int((group == picture).sum())
    kinds = torch.cat(laid)[None]
    ids = torch.where(kinds > 0, int(whole.config.image_token_id), 0)
    positions, _ = whole.model.get_rope_index(ids, image_grid_thw=torch.tensor(grids), mm_token_type_ids=kinds)
    found: Tensor = positions[:, 0] + start
    return found[:, torch.cat(picked)], int(found.max()) + 1
