"""Attention of some of a turn's query rows over all keys: the score side path of a cut.

Sums over many rows are made block by block (static blocks, unrolled), so that no map `[h, S, s]` is ever in memory, and one pass over the
blocks serves all sums of a layer. Where heads are averaged or added, rows are summed first. Rows of padding are zero and add nothing; a
pair that the mask hides is zero, as a weight and as a product.

Legend: b batch, h heads, R query rows, S tokens of the bucket, s keys, d channels of a head, m text tokens, u sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tmc_export.graphs._contract import Attention, Need
from tmc_export.plan.rows import ROW_BLOCK, is_sum, swept
from tmc_export.surgery._sums import Totals, add_rows, add_up, by_need, members_of
from tmc_export.surgery.attention import additive_mask
from tmc_export.surgery.stages import join_heads

__all__ = ["KeySide", "QuerySide", "row_scores"]


@dataclass(frozen=True)
class QuerySide:
    """The turn's query rows of one layer, and which of them are what.

    Attributes:
        query: `[b, h, S, d]`, scaled; `[b, h, 1, d]`, the last valid row, where no other is asked for.
        order: `[b, S]` places in the conversation.
        valid, text: `[b, S]` bool; `text` are the valid text tokens.
        last: `[b]` row of the last valid token.
        places, places_valid: `[b, m]` rows of the text tokens, in order; without columns where no stage reads them.
    """

    query: Tensor
    order: Tensor
    valid: Tensor
    text: Tensor
    last: Tensor
    places: Tensor
    places_valid: Tensor


@dataclass(frozen=True)
class KeySide:
    """The keys that one layer sees.

    Attributes:
        key: `[b, h, s, d]`, expanded to the query heads.
        order, valid: `[b, s]`.
        window: the layer's sliding window, or None.
    """

    key: Tensor
    order: Tensor
    valid: Tensor
    window: int | None


@dataclass(frozen=True)
class _Picked:
    """Some rows: `[b, h, R, d]` and twice `[b, R]`."""

    query: Tensor
    order: Tensor
    valid: Tensor


def row_scores(needs: Sequence[Attention], rows: QuerySide, keys: KeySide) -> dict[Need, Tensor]:
    """Compute what the needs of one layer ask for, in float32.

    Returns:
        Per need `[b, s]` for the last row and for sums, `[b, R, s]` for several rows; a head axis after the batch with `heads="none"`.
    """
    keys = KeySide(keys.key.float(), keys.order, keys.valid, keys.window)
    together = swept(needs)
    found: dict[Need, Tensor] = _sweep(together, rows, keys) if together else {}
    for kind in dict.fromkeys((n.rows, n.window if n.rows == "window" else 0) for n in needs if n not in together):
        mine = [n for n in needs if n not in together and (n.rows, n.window if n.rows == "window" else 0) == kind]
        found |= _few(mine, _pick(rows, *kind), keys)
    return found


def _pick(rows: QuerySide, kind: str, window: int) -> _Picked:
    """Gather the rows of `last`, `text` or `window`."""
    if kind == "text":
        place, valid = rows.places, rows.places_valid
    else:
        back = torch.arange(max(window, 1) - 1, -1, -1)
        place = rows.last[:, None] - back[None]
        valid = place >= 0
    place = place.clamp(min=0)
    query = rows.query
    if query.shape[2] > 1 or kind != "last":
        query = query.gather(2, place[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    return _Picked(query, rows.order.gather(1, place), valid)


def _blocks(count: int) -> Iterator[slice]:
    for start in range(0, count, ROW_BLOCK):
        yield slice(start, min(start + ROW_BLOCK, count))


def _joined(needs: Sequence[Attention], query: Tensor, order: Tensor, keys: KeySide) -> dict[tuple[str, bool], Tensor]:
    """Attend with a block of rows: per way of joining heads (and logits or not) `[b, R, s]`, or `[b, h, R, s]`."""
    weights = _weights(needs, query, order, keys)
    return {(n.heads, n.logits): join_heads(weights[n.logits], n) for n in needs}


def _weights(needs: Sequence[Attention], query: Tensor, order: Tensor, keys: KeySide) -> dict[bool, Tensor]:
    """Attend with a block of rows: logits or not → `[b, h, R, s]`."""
    mask = additive_mask(order, keys.order, keys.valid, keys.window, torch.float32)
    products = query.float() @ keys.key.transpose(-1, -2)
    weights: dict[bool, Tensor] = {}
    if any(not n.logits for n in needs):
        weights[False] = (products + mask).softmax(-1)
    if any(n.logits for n in needs):
        weights[True] = torch.where(mask < 0, 0.0, products)
    return weights


def _sweep(needs: Sequence[Attention], rows: QuerySide, keys: KeySide) -> dict[Need, Tensor]:
    """Go over all rows once and add each up where it belongs."""
    member = members_of(rows.valid, rows.text)
    totals: Totals = {}
    for block in _blocks(rows.query.shape[2]):
        weights = _weights(needs, rows.query[:, :, block], rows.order[:, block], keys)
        part = add_rows(needs, weights, {name: which[:, block] for name, which in member.items()})
        totals = {key: totals[key] + found if key in totals else found for key, found in part.items()}
    return by_need(needs, totals)


def _few(needs: Sequence[Attention], rows: _Picked, keys: KeySide) -> dict[Need, Tensor]:
    """Attend with picked rows; keep them, or add them up."""
    parts: dict[Attention, list[Tensor]] = {n: [] for n in needs}
    for block in _blocks(rows.query.shape[2]):
        joined = _joined(needs, rows.query[:, :, block], rows.order[:, block], keys)
        alive = rows.valid[:, block]
        for need in needs:
            values = joined[need.heads, need.logits]
            if is_sum(need):
                parts[need].append(add_up(alive[:, None].float(), values))
            else:
                seen = alive[:, :, None] if values.dim() == 3 else alive[:, None, :, None]
                parts[need].append(values if need.rows == "last" else torch.where(seen, values, 0.0))
    found: dict[Need, Tensor] = {}
    for need, made in parts.items():
        if is_sum(need):
            total = made[0]
            for part in made[1:]:
                total = total + part
            found[need] = total.squeeze(-2)
        else:
            found[need] = torch.cat(made, -2)
            if need.rows == "last":
                found[need] = found[need].squeeze(-2)
    return found
