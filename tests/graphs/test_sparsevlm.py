"""SparseVLM by hand, where its goldens do not reach: counts, raters without a say, padding, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Layout, Site
from tmc_export.graphs.sparsevlm import SparseVLM, ratings, score

MODEL = facts(decoder_layers=32)


def counts(config: SparseVLM.Config, arriving: int) -> list[list[int]]:
    """Tokens of every run after every cut."""
    here: Layout = layout(arriving, 8)
    found = []
    for stage in SparseVLM.stages(Site("decoder", config.layers[0]), config, MODEL):
        here = SparseVLM.layout(stage, here, config, MODEL)
        found.append([run.tokens for run in here.segments])
    return found


def test_the_published_table_gives_the_published_counts() -> None:
    # 276 dropped: int(82.8) + 1 = 83 recycled into 9; 109 dropped: 33 into 4; 94 dropped: 29 into 3
    assert counts(SparseVLM.Config(retain=192), 576) == [[576], [300, 9], [200, 4], [110, 3]]
    assert counts(SparseVLM.Config(retain=192, version=2, heads=4), 576) == [[576], [300], [200], [118]]
    assert counts(SparseVLM.Config(keep=(Budget(tokens=8),), layers=(3,)), 8) == [[8], [8]]  # nothing dropped, nothing recycled


def test_a_text_token_rates_above_the_mean() -> None:
    # one picture token (1, 0); text (ln 2, 0), (0, 5), (0, 0) and padding: softmax of ln 2, 0, 0 is 1/2, 1/4, 1/4, the mean 1/3
    tokens = torch.tensor([[[1.0, 0.0]]])
    text = torch.tensor([[[0.6931472, 0.0], [0.0, 5.0], [0.0, 0.0], [9.0, 9.0]]])
    there = torch.tensor([[True, True, True, False]])
    one = torch.ones(1, 1, dtype=torch.bool)
    assert ratings(tokens, one, text, there)[0].tolist() == pytest.approx([0.5, 0.25, 0.25, 0.0], abs=1e-6)
    stage = SparseVLM.stages(Site("decoder", 3), SparseVLM.Config(), MODEL)[0]
    here = replace(context(tokens, layout(1, 2), MODEL), text=text, text_valid=there)
    out = SparseVLM.apply(stage, tokens, here, SparseVLM.Config())
    assert out.state["raters"].tolist() == [[True, False, False, False]]
    same = replace(here, text=torch.zeros_like(text))  # all equal: none is above the mean, so all rate
    assert SparseVLM.apply(stage, tokens, same, SparseVLM.Config()).state["raters"].tolist() == [[True, True, True, False]]


def test_the_heads_with_the_most_attention_score() -> None:
    # heads see 0.5 + 0.1, 0.1 + 0.1 and 0.2 + 0.3 from the rater; the first and the third count
    rows = torch.tensor([[[[0.5, 0.1], [0.9, 0.9]], [[0.1, 0.1], [0.9, 0.9]], [[0.2, 0.3], [0.9, 0.9]]]])
    raters, both = torch.tensor([[True, False]]), torch.ones(1, 2, dtype=torch.bool)
    assert score(rows, raters, both, 2)[0].tolist() == pytest.approx([0.35, 0.2])
    assert score(rows, raters, both, 3)[0].tolist() == pytest.approx([0.8 / 3, 0.5 / 3])
    # a padded second candidate has no say in the choice: 0.5, 0.1, 0.2 still choose the same two
    assert score(rows, raters, torch.tensor([[True, False]]), 1)[0].tolist() == pytest.approx([0.5, 0.1])


def test_two_budgets_and_too_many_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="give one of them"):
        SparseVLM.Config(keep=(Budget(tokens=3),), retain=192)
    with pytest.raises(ValueError, match="lower heads"):
        SparseVLM.stages(Site("decoder", 3), SparseVLM.Config(version=2, heads=5), MODEL)
