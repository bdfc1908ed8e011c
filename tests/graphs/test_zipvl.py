"""ZipVL by hand: the smallest set that holds the threshold, within the cap."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Compressed, Site
from tmc_export.graphs.zipvl import ZipVL, important

MODEL = facts(decoder_layers=8)
SCORE = [8.0, 1.0, 4.0, 3.0]  # sum 16; falling: 8, 12, 15, 16 are 0.5, 0.75, 0.9375 and 1 of it


def run(keep: int, threshold: float | None, valid: list[bool] | None = None) -> Compressed:
    config = ZipVL.Config(keep=(Budget(tokens=keep),), threshold=threshold)
    (stage,) = ZipVL.stages(Site("decoder", 2), config, MODEL)
    tokens = torch.arange(4).float().reshape(1, 4, 1)
    here = context(tokens, layout(4, 1), MODEL, {stage.needs[0]: torch.tensor([SCORE])})
    return ZipVL.apply(stage, tokens, here if valid is None else replace(here, valid=torch.tensor([valid])), config)


@pytest.mark.parametrize(
    ("threshold", "wanted"),
    [(0.25, [0]), (0.5, [0]), (0.5625, [0, 2]), (0.75, [0, 2]), (0.8125, [0, 2, 3]), (1.0, [0, 1, 2, 3])],
)
def test_the_smallest_set_that_holds_the_threshold(threshold: float, wanted: list[int]) -> None:
    found = important(torch.tensor([SCORE]), torch.ones(1, 4, dtype=torch.bool), threshold)[0]
    assert torch.arange(4)[found].tolist() == wanted


def test_the_cap_keeps_the_best_and_marks_those_behind_the_threshold() -> None:
    out = run(3, 0.75)
    assert out.source.tolist() == [[0, 2, 3]]
    assert out.valid.tolist() == [[True, True, False]]  # 8 and 4 hold 0.75; 3 is not needed
    assert run(3, 0.8125).valid.tolist() == [[True, True, True]]
    assert run(1, 1.0).source.tolist() == [[0]]  # the cap wins
    assert run(3, None).valid.all()


def test_padding_holds_no_mass() -> None:
    # without the 8: 4, 7, 8 of 8; half of it is the 4 alone
    out = run(3, 0.5, [False, True, True, True])
    assert (out.source.tolist(), out.valid.tolist()) == ([[1, 2, 3]], [[False, True, False]])


def test_equal_scores_go_to_the_lowest_index() -> None:
    found = important(torch.ones(1, 4), torch.ones(1, 4, dtype=torch.bool), 0.5)
    assert found.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("layers", [(3, 2), (2, 8), (3,)])
def test_layers_that_do_not_rise_from_the_site_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must rise|write at: decoder.3"):
        ZipVL.stages(Site("decoder", 2), ZipVL.Config(keep=(Budget(tokens=2),) * len(layers), layers=layers), MODEL)
