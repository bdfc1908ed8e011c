"""AdaFV's split and what becomes of a token that both lists name, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Context, Site
from tmc_export.graphs.adafv import AdaFV, balance, text_score, times_picked

EVERY = torch.ones(1, 6, dtype=torch.bool)


def test_the_split_by_hand() -> None:
    # a = 0 … 3: 0 * 6 = 0, 4 * 4 = 16, 5 * 2 = 10, 6 * 0 = 0
    assert balance(torch.tensor([[4.0, 1.0, 1.0]]), torch.tensor([[2.0, 2.0, 2.0]]), 3).tolist() == [1]
    # equal lists of 1: 0, 2, 2, 0: the smaller a
    assert balance(torch.ones(1, 3), torch.ones(1, 3), 3).tolist() == [1]


def test_each_list_has_its_floor_and_may_name_the_same() -> None:
    similarity = torch.tensor([[0.9, 0.8, 0.1, 0.0, 0.0, 0.0]])
    attention = torch.tensor([[0.9, 0.1, 0.0, 0.0, 0.8, 0.0]])
    # k 4, floor 1: both name 0. Then 2 places: a = 1: .8 * .8 beats a = 0 and a = 2 (0 each): 1 and 4
    assert times_picked(similarity, attention, 4, 1, EVERY).tolist() == [[2, 1, 0, 0, 1, 0]]


def _stage_two(similar_to: list[list[float]], attention: list[float]) -> tuple[torch.Tensor, Context]:
    tokens = torch.tensor([similar_to])
    text = torch.tensor([[[1.0, 0.0], [50.0, 50.0]]])
    here = context(tokens, layout(len(similar_to), 2), facts(class_tokens=1), state={"attention": torch.tensor([attention])})
    return tokens, replace(here, text=text, text_valid=torch.tensor([[True, False]]))


def test_a_freed_place_is_filled_by_the_best_placed() -> None:
    # the text looks right: 0, 1, 2 … turn away from it. s falls with the index; attention as in the test above
    angles = torch.deg2rad(torch.tensor([0.0, 5.0, 10.0, 15.0, 20.0, 25.0]))
    tokens, here = _stage_two(torch.stack([angles.cos(), angles.sin()], dim=1).tolist(), [0.9, 0.1, 0.05, 0.0, 0.8, 0.0])
    config = AdaFV.Config(keep=4)
    stage = AdaFV.stages(Site.parse("decoder.0"), config, facts(class_tokens=1))[1]
    # both lists name 0; 1 and 4 as above; the free place goes to 2, third in s (3 and 5 are fourth at best)
    assert AdaFV.apply(stage, tokens, here, config).source.tolist() == [[0, 1, 2, 4]]


def test_padded_text_is_not_asked() -> None:
    tokens, here = _stage_two([[1.0, 0.0], [0.7, 0.7]], [0.5, 0.5])
    assert here.text is not None and here.text_valid is not None
    valid = torch.ones(1, 2, dtype=torch.bool)
    score = text_score(tokens, here.text, here.text_valid, valid)
    assert score[0, 0] > 0.99 > 0.01 > score[0, 1]
    asked = text_score(tokens, here.text, torch.ones(1, 2, dtype=torch.bool), valid)
    assert asked[0, 1] > 0.99


def test_tokens_that_went_missing_between_the_stages_are_refused() -> None:
    tokens, here = _stage_two([[1.0, 0.0], [0.7, 0.7]], [0.5, 0.5, 0.5])
    config = AdaFV.Config(keep=1)
    stage = AdaFV.stages(Site.parse("decoder.0"), config, facts(class_tokens=1))[1]
    with pytest.raises(ValueError, match="scored 3 tokens in the encoder and 2 arrive at decoder.0; let"):
        AdaFV.apply(stage, tokens, here, config)
