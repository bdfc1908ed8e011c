"""MustDrop by hand, where its goldens do not reach: the key set, what keeps it, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Budget, Site
from tmc_export.graphs.mustdrop import MustDrop, relevance

MODEL = facts(class_tokens=1)
CONFIG = MustDrop.Config(key=Budget(tokens=2), layers=(3,), keep=(Budget(tokens=3),), global_threshold=0.25, individual_threshold=0.5)
MERGE, MARK, CUT = MustDrop.stages(Site("encoder", 1), CONFIG, MODEL)


def test_the_class_token_marks_the_key_set() -> None:
    tokens = torch.arange(6).float().reshape(1, 6, 1)
    row = torch.tensor([[9.0, 0.1, 0.5, 0.3, 0.3, 0.2]])  # itself first; patches 1 and 2, the latter before 3 by index
    out = MustDrop.apply(MARK, tokens, context(tokens, layout(6, 1, class_tokens=1), MODEL, {MARK.needs[0]: row}), CONFIG)
    assert out.state["key"].tolist() == [[False, True, True, False, False]]
    assert out.source.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_the_key_layer_is_the_one_behind_the_features() -> None:
    models = [replace(MODEL, encoder=replace(MODEL.encoder, spare=spare)) for spare in (0, 1)]
    asked = [MustDrop.stages(Site("encoder", 1), CONFIG, model)[1].needs[0] for model in models]
    assert [need.layer for need in asked if isinstance(need, Attention)] == ["previous", "next"]


def test_key_tokens_stay_and_the_rest_is_ranked_by_either_threshold() -> None:
    # columns: sums 0.2, 0.2, 1.0, 0.6, 0.0 of 2.0, so over 0.25 * 2: 0.4, 0.4, 2, 1.2, 0; maxima over 0.5: 0.2, 0.4, 1, 1.2, 0
    rows = torch.tensor([[[0.1, 0.2, 0.5, 0.6, 0.0], [0.1, 0.0, 0.5, 0.0, 0.0], [7.0, 7.0, 7.0, 7.0, 7.0]]])
    there = torch.tensor([[True, True, False]])
    every = torch.ones(1, 5, dtype=torch.bool)
    assert relevance(rows, there, every, CONFIG)[0].tolist() == pytest.approx([0.4, 0.4, 2.0, 1.2, 0.0], abs=1e-6)
    tokens = torch.arange(5).float().reshape(1, 5, 1)
    key = torch.tensor([[True, False, False, False, True]])
    here = context(tokens, layout(5, 1), MODEL, {need: rows for need in CUT.needs if isinstance(need, Attention)}, {"key": key})
    out = MustDrop.apply(CUT, tokens, replace(here, text_valid=there), CONFIG)
    assert out.source.tolist() == [[0, 2, 4]]  # both key tokens, and the best of the others
    assert out.state["key"].tolist() == [[True, False, True]]
    none = replace(here, text_valid=there, state={"key": torch.zeros_like(key)})
    assert MustDrop.apply(CUT, tokens, none, CONFIG).source.tolist() == [[0, 2, 3]]  # 0.4 twice: the lower index


def test_fewer_than_the_key_set_and_a_cut_in_between_are_refused() -> None:
    with pytest.raises(ValueError, match="fewer than the 2 key tokens"):
        MustDrop.layout(CUT, layout(5, 1), CONFIG.model_copy(update={"keep": (Budget(tokens=1),)}), MODEL)
    tokens = torch.zeros(1, 5, 1)
    here = context(tokens, layout(5, 1), MODEL, {}, {"key": torch.ones(1, 6, dtype=torch.bool)})
    with pytest.raises(ValueError, match="let no other method cut between"):
        MustDrop.apply(CUT, tokens, here, CONFIG)


@pytest.mark.parametrize(("window", "merge"), [((3, 3), 1), ((1, 1), 1), ((2, 2), 17)])
def test_windows_that_do_not_tile_or_are_too_many_are_refused(window: tuple[int, int], merge: int) -> None:
    config = MustDrop.Config(window=window, merge=Budget(tokens=merge))
    with pytest.raises(ValueError, match="does not tile|set merge to 1 to 16"):
        MustDrop.layout(MERGE, layout(65, 4, class_tokens=1, grid=(8, 8)), config, MODEL)


@pytest.mark.parametrize(("merge", "sizes"), [(0, [1] * 9), (1, [1, 4, 1, 1, 1, 1]), (2, [1, 4, 4])])
def test_none_one_and_all_windows_merge(merge: int, sizes: list[int]) -> None:
    # 2 x 4 patches, windows (0, 1, 4, 5) and (2, 3, 6, 7) counted without the class token; the second is alike
    values = [[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [3.0, 0.0]]
    tokens = torch.tensor([values])
    config = MustDrop.Config(window=(2, 2), merge=Budget(tokens=merge))
    arriving = layout(9, 2, class_tokens=1, grid=(2, 4))
    out = MustDrop.apply(MERGE, tokens, context(tokens, arriving, MODEL), config)
    assert out.assign is not None
    assert torch.bincount(out.assign[0]).tolist() == sizes
    if merge:
        assert out.tokens[0, 1].tolist() == [1.5, 0.0]  # (1 + 1 + 1 + 3) / 4
        assert MustDrop.layout(MERGE, arriving, config, MODEL).tokens == out.tokens.shape[1] == len(sizes)
