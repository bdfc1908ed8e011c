"""Adding up rows of an attention map: one 0/1 product for all sums that read the same form of it.

Legend: b batch, h heads, R query rows, s keys, u sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tmc_export.graphs._contract import Attention, Need
from tmc_export.surgery.stages import join_heads

__all__ = ["Totals", "add_rows", "add_up", "by_need", "members_of", "sum_name"]

Totals = dict[tuple[str, bool], Tensor]
"""How heads are joined, and whether it is products: `[b, u, s]`, with `heads="none"` `[b, h, u, s]`."""


def sum_name(layer: int, number: int) -> str:
    """Name of a sum over rows of a layer's map, where it leaves a block and where it enters a compress graph."""
    return f"sums.{layer}.{number}"


def members_of(valid: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Which rows belong to which sum: `[b, R]` bool per `Attention.rows`; `text` are the valid text tokens."""
    return {"all": valid, "text": text, "visual": valid & ~text}


def add_rows(needs: Sequence[Attention], weights: Mapping[bool, Tensor], member: Mapping[str, Tensor]) -> Totals:
    """Add up rows of a map.

    Args:
        needs: the sums.
        weights: logits or not → `[b, h, R, s]`.
        member: as `members_of` returns it, of these rows.
    """
    totals: Totals = {}
    for key, same in _kinds(needs).items():
        values, which = weights[same[0].logits], torch.stack([member[n.rows] for n in same], 1)
        which = which.to(values.dtype)  # [b, u, R]
        if same[0].heads in ("mean", "sum"):  # rows first: a product reads the map once, where a mean over heads would write one, too
            totals[key] = join_heads(add_up(which, values), same[0])
        else:
            totals[key] = add_up(which, join_heads(values, same[0]))
    return totals


def by_need(needs: Sequence[Attention], totals: Totals) -> dict[Need, Tensor]:
    """What `add_rows` returned, per need: `[b, s]`, with `heads="none"` `[b, h, s]`."""
    return {n: totals[key][..., i, :] for key, same in _kinds(needs).items() for i, n in enumerate(same)}


def add_up(which: Tensor, values: Tensor) -> Tensor:
    """Sum rows: `[b, u, R]` with `[b, R, s]` → `[b, u, s]`; with a head axis after the batch, that stays."""
    return (which if values.dim() == 3 else which[:, None]) @ values


def _kinds(needs: Sequence[Attention]) -> dict[tuple[str, bool], list[Attention]]:
    keys = dict.fromkeys((n.heads, n.logits) for n in needs)
    return {key: [n for n in needs if (n.heads, n.logits) == key] for key in keys}
