"""Sums that a block adds up out of its own map, against the side path that computes the map once more."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.surgery.test_rows import HEAD, HEADS, compare, plain, sides
from tmc_export.graphs._contract import Attention
from tmc_export.surgery._rows import row_scores
from tmc_export.surgery._sums import members_of
from tmc_export.surgery.attention import AttentionState, additive_mask, recording, static_attention

NEEDS = (
    Attention(rows="visual", heads="max", row_sum=True),
    Attention(rows="text", heads="max", row_sum=True),
    Attention(rows="all", heads="mean"),
    Attention(rows="text", heads="mean", row_sum=True),
    Attention(rows="visual", heads="none", row_sum=True),
    Attention(rows="all", heads="sum"),
)


@pytest.mark.parametrize("past", [0, 11])
def test_the_block_s_own_map_gives_the_sums_of_the_side_path(past: int) -> None:
    size, count = 40, 33
    rows, keys, group = sides(size, count, past)
    seen = past + count
    key = keys.key[:, :, :seen]
    new = torch.cat([key[:, :, past:], torch.full((2, HEADS, size - count, HEAD), 9.0)], 2)  # padding behind
    old = torch.cat([key[:, :, :past], torch.full((2, HEADS, 3, HEAD), 9.0)], 2)  # slots not in use
    order = torch.cat([torch.arange(past + 3).expand(2, -1), rows.order], 1)
    valid = torch.cat([(torch.arange(past + 3) < past).expand(2, -1), rows.valid], 1)
    state = AttentionState(
        past={5: (old, old)}, masks={5: additive_mask(rows.order, order, valid, None, torch.float32)}, summed={5: NEEDS},
        member=members_of(rows.valid, rows.text),
    )  # fmt: skip
    with recording(state):
        static_attention(SimpleNamespace(layer_idx=5, head_dim=HEAD), rows.query, new, new, None, scaling=1.0)
    whole = row_scores(NEEDS, rows, keys)
    for need in NEEDS:
        got = state.sums[5][need]
        mine = torch.cat([got[..., :past], got[..., past + 3 : past + 3 + count]], -1)
        assert compare(mine, plain(need, rows, keys, group, count)) < 2e-6
        assert compare(mine, whole[need][..., :seen]) < 2e-6
        assert not got[..., past : past + 3].any() and not got[..., past + 3 + count :].any()
    wrong = replace(state, member=members_of(torch.ones_like(rows.valid), rows.text), sums={})
    with recording(wrong):
        static_attention(SimpleNamespace(layer_idx=5, head_dim=HEAD), rows.query, new, new, None, scaling=1.0)
    assert float((wrong.sums[5][NEEDS[2]] - state.sums[5][NEEDS[2]]).abs().max()) > 1e-3  # rows of padding that count
