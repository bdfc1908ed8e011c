"""Attention rows of the side path against a whole map computed at once, without blocks, padding or a shared pass."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tmc_export.graphs._contract import Attention
from tmc_export.plan.rows import ROW_BLOCK, rows_computed, swept
from tmc_export.surgery._rows import KeySide, QuerySide, row_scores

HEADS, HEAD = 4, 8
NEEDS = (
    Attention(rows="last"),
    Attention(rows="last", heads="none", logits=True),
    Attention(rows="text"),
    Attention(rows="text", heads="none"),
    Attention(rows="text", heads="max", row_sum=True),
    Attention(rows="visual", heads="max", row_sum=True),
    Attention(rows="visual", heads="none", row_sum=True, logits=True),
    Attention(rows="window", window=8, heads="sum"),
    Attention(rows="window", window=8, row_sum=True),
    Attention(rows="all", heads="sum", logits=True),
    Attention(rows="all"),
)


def sides(size: int, count: int, past: int, seed: int = 0) -> tuple[QuerySide, KeySide, Tensor]:
    """A turn of `count` tokens in a bucket of `size`, behind `past` others, twice in a batch; every third token is text. And its places."""
    torch.manual_seed(seed)
    capacity = past + size + 5
    group = torch.tensor([1 if i % 3 else 0 for i in range(count)] + [0] * (size - count)).expand(2, -1)
    valid = (torch.arange(size) < count).expand(2, -1)
    text = valid & (group == 0)
    found = torch.nonzero(text[0])[:, 0]
    places = torch.zeros(2, len(found) + 3, dtype=torch.long)
    places[:, : len(found)] = found
    order = torch.where(valid, past + torch.arange(size), -1)
    rows = QuerySide(
        torch.randn(2, HEADS, size, HEAD), order, valid, text, torch.full((2,), count - 1), places,
        (torch.arange(places.shape[1]) < len(found)).expand(2, -1),
    )  # fmt: skip
    key = torch.randn(2, HEADS, capacity, HEAD)
    key[:, :, past + count :] = 40.0  # what lies in unused slots must not matter
    keys = KeySide(key, torch.arange(capacity).expand(2, -1), (torch.arange(capacity) < past + count).expand(2, -1), None)
    return rows, keys, group


def plain(need: Attention, rows: QuerySide, keys: KeySide, group: Tensor, count: int) -> Tensor:
    """The same from the whole map, item by item."""
    out = []
    for item in range(2):
        query, key = rows.query[item, :, :count], keys.key[item, :, keys.valid[item]]
        seen = rows.order[item, :count, None] >= keys.order[item, keys.valid[item]][None]
        if keys.window is not None:
            seen &= rows.order[item, :count, None] - keys.order[item, keys.valid[item]][None] < keys.window
        products = query @ key.transpose(1, 2)
        full = torch.where(seen, products, 0.0) if need.logits else products.masked_fill(~seen, float("-inf")).softmax(-1)
        here = [i for i in range(count) if {"text": group[item, i] == 0, "visual": group[item, i] == 1}.get(need.rows, True)]
        here = here[-need.window :] if need.rows == "window" else here[-1:] if need.rows == "last" else here
        chosen = full[:, here]
        joined = {"mean": chosen.mean(0), "max": chosen.amax(0), "sum": chosen.sum(0), "none": chosen}[need.heads]
        summed = need.row_sum or need.rows in ("all", "visual")
        out.append(joined.sum(-2) if summed else joined.squeeze(-2) if need.rows == "last" else joined)
    return torch.stack(out)


def compare(got: Tensor, want: Tensor) -> float:
    """Largest difference over the valid keys, of the largest value where that is above 1; rows of padding behind must be zero."""
    if got.dim() > 2 and got.shape[-2] > want.shape[-2]:
        assert not got[..., want.shape[-2] :, :].any()
        got = got[..., : want.shape[-2], :]
    return float((got[..., : want.shape[-1]] - want).abs().max() / want.abs().max().clamp(min=1.0))


@pytest.mark.parametrize("need", NEEDS, ids=str)
@pytest.mark.parametrize(("size", "past", "window"), [(40, 0, None), (300, 0, None), (300, 11, None), (40, 11, 9)])
def test_each_need_is_what_the_whole_map_says(need: Attention, size: int, past: int, window: int | None) -> None:
    rows, keys, group = sides(size, size - 7, past)
    keys = replace(keys, window=window)
    want = plain(need, rows, keys, group, size - 7)
    assert compare(row_scores([need], rows, keys)[need], want) < 2e-6
    together = row_scores(NEEDS, rows, keys)
    assert set(together) == set(NEEDS) and compare(together[need], want) < 2e-6


@pytest.mark.parametrize("need", [n for n in NEEDS if n.rows != "last" and not n.logits], ids=str)
def test_rows_of_padding_that_count_are_found(need: Attention) -> None:
    """Products are left out: a row of padding sees nothing, so that its products are zero anyway."""
    rows, keys, group = sides(40, 33, 0)
    wrong = replace(
        rows, valid=torch.ones_like(rows.valid), text=rows.text | ~rows.valid, places_valid=torch.ones_like(rows.places_valid),
        last=rows.last + 2,
    )  # fmt: skip
    got = row_scores([need], wrong, keys)[need]
    want = plain(need, rows, keys, group, 33)
    if got.dim() > 2 and need.rows == "text":
        assert got[..., want.shape[-2] :, :].any()
    elif need.rows == "visual":  # every row that is not text is visual: the padding was made text above
        wrong = replace(rows, valid=torch.ones_like(rows.valid))
        assert compare(row_scores([need], wrong, keys)[need], want) > 1e-3
    else:
        assert compare(got, want) > 1e-3


def test_heads_are_joined_before_rows_are_summed() -> None:
    rows, keys, group = sides(40, 33, 0)
    need = Attention(rows="all", heads="max")
    each = plain(Attention(rows="all", heads="none"), rows, keys, group, 33)
    assert compare(row_scores([need], rows, keys)[need], each.amax(1)) > 1e-2


def test_a_window_longer_than_the_turn_has_its_rows_at_the_end() -> None:
    rows, keys, group = sides(40, 5, 3)
    need = Attention(rows="window", window=8)
    got = row_scores([need], rows, keys)[need]
    assert not got[:, :3].any() and compare(got[:, 3:], plain(need, rows, keys, group, 5)) < 2e-6


def test_what_a_row_sees_does_not_depend_on_the_bucket() -> None:
    for need in NEEDS:
        small, keys, group = sides(40, 33, 4)
        large, wide, _ = sides(200, 33, 4)
        query = large.query.clone()
        query[:, :, :40] = small.query
        key = wide.key.clone()
        key[:, :, :37] = keys.key[:, :, :37]
        got = row_scores([need], replace(large, query=query), replace(wide, key=key))[need]
        assert compare(got, plain(need, small, keys, group, 33)) < 2e-6


@pytest.mark.parametrize("size", [40, 300])
def test_all_sums_of_a_layer_are_one_pass_and_the_plan_knows_its_price(size: int) -> None:
    rows, keys, _ = sides(size, size - 7, 0)
    text, slots = rows.places.shape[1], keys.key.shape[2]
    for chosen in ((4, 5), (4, 5, 9, 10), (2, 3, 4), (0,), (7, 8, 0), tuple(range(len(NEEDS)))):
        needs = [NEEDS[i] for i in chosen]
        with FlopCounterMode(display=False) as counter:
            row_scores(needs, rows, keys)
        count = rows_computed(needs, size, text)
        side_path = 2 * 2 * count * slots * HEADS * HEAD
        kinds = {}
        for need in swept(needs):
            kinds.setdefault((need.heads, need.logits), []).append(need)
        before = ("none", "mean", "sum")  # rows are added up before heads are joined, or heads stay
        adding = sum(2 * 2 * len(same) * size * slots * (HEADS if heads in before else 1) for (heads, _), same in kinds.items())
        adding += sum(
            2 * 2 * {"text": text, "window": n.window}[n.rows] * slots
            for n in needs
            if n not in swept(needs) and n.row_sum and n.heads != "none"
        )
        assert counter.get_total_flops() == side_path + adding, chosen
    assert rows_computed([NEEDS[4], NEEDS[5]], size, text) == size, "the text sum comes with the visual one"
    assert size == 40 or size > 2 * ROW_BLOCK


def test_every_way_of_joining_is_served() -> None:
    rows, keys, group = sides(20, 17, 2)
    for row, heads, logits, row_sum in product(
        ("text", "window", "visual", "all"), ("mean", "max", "sum", "none"), (False, True), (False, True)
    ):
        need = Attention(rows=row, heads=heads, logits=logits, row_sum=row_sum or row == "visual", window=4 if row == "window" else 0)  # type: ignore[arg-type]
        assert compare(row_scores([need], rows, keys)[need], plain(need, rows, keys, group, 17)) < 2e-6, need
