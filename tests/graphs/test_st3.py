"""ST3 by hand: the line from what arrives to what is left, and which tokens stay."""

from __future__ import annotations

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Budget, Compressed, Layout, Site, Stage
from tmc_export.graphs.st3 import ST3

MODEL = facts(decoder_layers=8)
CONFIG = ST3.Config(keep=Budget(tokens=2), cuts=2, every=3)
FIRST, SECOND = ST3.stages(Site("decoder", 1), CONFIG, MODEL)


def run(stage: Stage, arriving: Layout, score: list[float]) -> Compressed:
    tokens = torch.arange(len(score)).float().reshape(1, -1, 1)
    return ST3.apply(stage, tokens, context(tokens, arriving, MODEL, {stage.needs[0]: torch.tensor([score])}), CONFIG)


def test_six_tokens_become_four_and_two() -> None:
    # N0 = 6, keep = 2: 6 - floor(4 * 1 / 2) = 4 after decoder.1, 6 - floor(4 * 2 / 2) = 2 after decoder.4
    assert [str(s.at) for s in (FIRST, SECOND)] == ["decoder.1", "decoder.4"]
    one = ST3.layout(FIRST, layout(6, 1), CONFIG, MODEL)
    assert (one.tokens, one.entry_tokens, one.positions) == (4, 6, "keep")
    assert ST3.layout(SECOND, one, CONFIG, MODEL).tokens == 2
    # 5, 4, 4 and 3 are the largest four
    out = run(FIRST, layout(6, 1), [5.0, 1.0, 4.0, 4.0, 0.0, 3.0])
    assert out.source.tolist() == [[0, 2, 3, 5]]
    assert out.tokens[0, :, 0].tolist() == [0.0, 2.0, 3.0, 5.0]
    # of the four that are left, the second and the first; in their order
    assert run(SECOND, one, [2.0, 3.0, 1.0, 0.0]).source.tolist() == [[0, 1]]


def test_a_line_that_does_not_divide_rounds_the_removed_down() -> None:
    # N0 = 196, keep = 98, three cuts: 98 / 3 = 32.67, 65.33, 98 removed
    config = ST3.Config(keep=Budget(tokens=98), cuts=3, every=1)
    here, counts = layout(196, 1), []
    for stage in ST3.stages(Site("decoder", 1), config, MODEL):
        here = ST3.layout(stage, here, config, MODEL)
        counts.append(here.tokens)
    assert counts == [164, 131, 98]


def test_ties_go_to_the_lowest_index_and_one_score_decides() -> None:
    assert run(FIRST, layout(6, 1), [1.0, 2.0, 2.0, 2.0, 1.0, 1.0]).source.tolist() == [[0, 1, 2, 3]]
    assert run(FIRST, layout(6, 1), [1.0, 2.0, 2.0, 2.0, 1.0, 1.5]).source.tolist() == [[1, 2, 3, 5]]


@pytest.mark.parametrize("options", [{"cuts": 8, "every": 1}, {"cuts": 2, "every": 7}])
def test_a_cut_behind_the_last_layer_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="lower cuts or every"):
        ST3.stages(Site("decoder", 1), ST3.Config(**options), MODEL)


def test_another_method_in_between_is_refused() -> None:
    with pytest.raises(ValueError, match="another method cut in between"):
        ST3.layout(SECOND, layout(4, 1), CONFIG, MODEL)
