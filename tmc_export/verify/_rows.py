"""The reference's attention rows at a decoder cut: whole eager maps, rows picked out by their indices, nothing in blocks and no padding.

Legend: h heads, g KV heads, T tokens of the turn, s keys, d channels of a head, n candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Attention

__all__ = ["LayerMap", "picked_rows"]


@dataclass(frozen=True)
class LayerMap:
    """What one layer's eager attention computed for a turn.

    Attributes:
        weights: `[h, T, s]` after softmax.
        seen: `[T, s]` bool; the pairs that the mask does not hide.
        query, key: `[h, T, d]` scaled and `[g, s, d]`, where a stage wants the products before softmax.
    """

    weights: Tensor
    seen: Tensor
    query: Tensor | None = None
    key: Tensor | None = None

    def values(self, logits: bool) -> Tensor:
        """The map `[h, T, s]` in float32; hidden pairs are zero."""
        if not logits:
            return self.weights.float()
        if self.query is None or self.key is None:
            raise ExportError("the reference did not look at this layer's queries and keys, which attention before softmax is made of")
        key = self.key.float().repeat_interleave(self.query.shape[0] // self.key.shape[0], 0)
        return torch.einsum("htd,hsd->hts", self.query.float(), key) * self.seen


def picked_rows(layer: LayerMap, need: Attention, group: Tensor, place: str) -> Tensor:
    """Reduce a layer's map to what a need asks for, over all keys.

    Args:
        layer: the map.
        need: which rows, and how they are joined.
        group: `[T]` 0 text, else the picture's number.
        place: for messages.

    Returns:
        `[1, s]` for the last row and for sums, `[1, rows, s]` for several rows; a head axis after the batch with `heads="none"`.

    Raises:
        ExportError: the need is not served here.
    """
    count = group.shape[0]
    every = torch.arange(count)
    rows = {
        "last": every[-1:],
        "text": every[group == 0],
        "visual": every[group > 0],
        "all": every,
        "window": every[-need.window :] if need.window else every[:0],
    }.get(need.rows)
    if rows is None or need.heads == "joined":
        raise ExportError(f"the reference does not capture {need} at {place}; a decoder has rows of last, text, visual, window and all")
    chosen = layer.values(need.logits)[:, rows]
    if need.rows == "window" and len(rows) < need.window:
        chosen = torch.cat([chosen.new_zeros(chosen.shape[0], need.window - len(rows), chosen.shape[2]), chosen], 1)
    if need.heads != "none":
        chosen = {"mean": chosen.mean(0), "max": chosen.amax(0), "sum": chosen.sum(0)}[need.heads]
    if need.row_sum or need.rows in ("visual", "all"):
        chosen = chosen.sum(-2)
    elif need.rows == "last":
        chosen = chosen.squeeze(-2)
    return chosen[None]
