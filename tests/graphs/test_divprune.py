"""DivPrune on cases worked out by hand: the order of picks, copies, and padding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, layout
from tmc_export.graphs._contract import Site
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.divprune import DivPrune, picks

EVERY = torch.ones(1, 5, dtype=torch.bool)
# in the plane: right, up, left, up again, up and right (45 degrees)
POINTS = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 5.0], [1.0, 1.0]]])


def _kept(keep: int, valid: torch.Tensor = EVERY, repeats: bool = False, points: torch.Tensor = POINTS) -> list[int]:
    config = DivPrune.Config(keep=keep, repeats=repeats)
    (stage,) = DivPrune.stages(Site.parse("projector"), config, FACTS)
    here = replace(context(points, layout(5, 2), FACTS), valid=valid)
    return DivPrune.apply(stage, points, here, config).source[0].tolist()


def test_the_order_of_picks() -> None:
    # nearest other, as 1 - cos: right .29 (4), up 0 (3), left 1 (1, 3), up 0, diagonal .29: left first.
    # from left: right 2, up 1, up 1, diagonal 1.71: right. then up 1, up 1, diagonal .29: the first up. Then diagonal .29, the copy 0
    assert picks(POINTS, 5, EVERY)[0].tolist() == [[2, 0, 1, 4, 3]]
    assert _kept(3) == [0, 1, 2]


COPIES = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])


def test_once_only_copies_are_left_the_lowest_index_is_next() -> None:
    # every nearest other is a copy, at 0: 0 first; then 2 at distance 1; then 0 everywhere: 1, 3, 4, or 0 again and again
    assert picks(COPIES, 5, EVERY)[0].tolist() == [[0, 2, 1, 3, 4]]
    assert picks(COPIES, 5, EVERY, repeats=True)[0].tolist() == [[0, 2, 0, 0, 0]]


def test_repeated_picks_leave_in_order() -> None:
    assert _kept(4, repeats=True, points=COPIES) == [0, 0, 0, 2]
    assert _kept(4, points=COPIES) == [0, 1, 2, 3]


def test_padding_is_picked_last_and_changes_nothing() -> None:
    valid = torch.tensor([[True, True, False, True, True]])
    # without left: right and the diagonal are .29 from their nearest: right first; then up 1, and its copy 1; diagonal .29; copy; padding
    assert picks(POINTS, 5, valid)[0].tolist() == [[0, 1, 4, 3, 2]]
    assert _kept(4, valid) == [0, 1, 3, 4]


def test_repeats_inside_the_decoder_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats: true .* decoder.0; use at: projector"):
        DivPrune.stages(Site.parse("decoder.0"), DivPrune.Config(repeats=True), FACTS)
