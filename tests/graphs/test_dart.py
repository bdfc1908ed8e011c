"""DART on cases worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tmc_export.graphs._contract import Context, Layout, Segment, Site
from tmc_export.graphs._synthetic import FACTS
from tmc_export.graphs.dart import Dart

# Unit vectors in the plane by their angle in degrees, times a length; the absolute sum of (cos, sin) * length ranks the pivots.
ANGLES = [0, 10, 60, 90, 135, 180, 270, 350]
LENGTHS = [1.0, 5.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0]


def _points(angles: list[int], lengths: list[float]) -> torch.Tensor:
    a = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    return (torch.stack([a.cos(), a.sin()], dim=1) * torch.tensor(lengths, dtype=torch.float64).unsqueeze(1)).float().unsqueeze(0)


def _kept(config: Dart.Config, text: torch.Tensor | None = None, valid: torch.Tensor | None = None) -> list[int]:
    tokens = _points(ANGLES, LENGTHS)
    here = Context(
        layout=Layout((Segment("visual", len(ANGLES)),), 2),
        facts=FACTS,
        valid=torch.ones(1, len(ANGLES), dtype=torch.bool) if valid is None else valid,
        source=torch.arange(len(ANGLES)).unsqueeze(0),
    )
    if text is not None:
        here = replace(here, text=text, text_valid=torch.ones(text.shape[:2], dtype=torch.bool))
    (stage,) = Dart.stages(Site.parse("decoder.0" if text is not None else "projector"), config, FACTS)
    return Dart.apply(stage, tokens, here, config).source[0].tolist()


def test_one_pivot_retains_what_points_away_from_it() -> None:
    # pivot: 1 (10 degrees, length 5). Farthest in angle: 180 (170 away), 135 (125), 270 (100), then 90 (80)
    assert _kept(Dart.Config(keep=4, pivot_image=1, pivot_text=0)) == [1, 4, 5, 6]


def test_every_pivot_takes_its_share_of_what_is_left() -> None:
    # pivots: 1 (|x|_1 = 5 * 1.158), 3 (2.0). k = 5: 3 left, 2 pivots: ceil(3 / 2) = 2 for the first: 5 (170 away), 4 (125);
    # 1 for the second, at 90: farthest of the rest (0: 90 away, 2: 30, 6: 180, 7: 100) is 6
    assert _kept(Dart.Config(keep=5, pivot_image=2, pivot_text=0)) == [1, 3, 4, 5, 6]


def test_text_pivots_come_after_the_image_pivots() -> None:
    # image pivot 1; text pivot at 180 (length 3 beats the one at 90). k = 4: 3 left: 2 for the image pivot: 5, 4;
    # 1 for the text pivot at 180: farthest is 0 (180 away; 7: 170)
    text = _points([90, 180], [1.0, 3.0])
    assert _kept(Dart.Config(keep=4, pivot_image=1, pivot_text=1), text) == [0, 1, 4, 5]
    # the other text token as the pivot: 270 is 180 away from 90
    assert _kept(Dart.Config(keep=4, pivot_image=1, pivot_text=1), _points([90, 180], [4.0, 3.0])) == [1, 4, 5, 6]


def test_more_text_pivots_than_text() -> None:
    # the only text token (180) stands for both text pivots; 3 left, 3 pivots: 5 for the image pivot, 0 and then 7 (170 away) for the text
    assert _kept(Dart.Config(keep=4, pivot_image=1, pivot_text=2), _points([180], [1.0])) == [0, 1, 5, 7]


def test_padded_text_is_as_good_as_none() -> None:
    # two text tokens for four text pivots, alone and with padding longer than either: the same choice
    tokens, text = _points(ANGLES, LENGTHS), _points([180, 90], [3.0, 1.0])
    padded = torch.cat([text, torch.full((1, 5, 2), 9.0)], dim=1)
    config = Dart.Config(keep=6, pivot_image=1, pivot_text=4)
    (stage,) = Dart.stages(Site.parse("decoder.0"), config, FACTS)
    kept = []
    for given in (text, padded):
        here = Context(
            layout=Layout((Segment("visual", len(ANGLES)),), 2),
            facts=FACTS,
            valid=torch.ones(1, len(ANGLES), dtype=torch.bool),
            source=torch.arange(len(ANGLES)).unsqueeze(0),
            text=given,
            text_valid=torch.arange(given.shape[1]).unsqueeze(0) < 2,
        )
        kept.append(Dart.apply(stage, tokens, here, config).source.tolist())
    # 5 left, 5 pivots, one each: 5 for the image pivot (170 away); 0 for 180 (180), 6 for 90 (180), for 180 again 7 (170) and 2 (120)
    assert kept[0] == kept[1] == [[0, 1, 2, 5, 6, 7]]


def test_a_budget_below_the_pivots_keeps_pivots() -> None:
    # |x|_1: 1.0, 5.79, 1.37, 2.0, 1.41, 1.0, 1.0, 1.16: the two largest are 1 and 3
    assert _kept(Dart.Config(keep=2, pivot_image=4, pivot_text=0)) == [1, 3]


def test_equal_candidates_go_to_the_lowest_index() -> None:
    # pivot 1 at 10 degrees; 100 and -80 degrees are both 90 away: give two copies of the same point instead, which tie exactly
    tokens = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]])
    here = Context(
        layout=Layout((Segment("visual", 4),), 2),
        facts=FACTS,
        valid=torch.ones(1, 4, dtype=torch.bool),
        source=torch.arange(4).unsqueeze(0),
    )
    config = Dart.Config(keep=2, pivot_image=1, pivot_text=0)
    (stage,) = Dart.stages(Site.parse("projector"), config, FACTS)
    assert Dart.apply(stage, tokens, here, config).source.tolist() == [[0, 1]]


def test_the_count_is_rounded_up() -> None:
    # 30% of 8 is 2.4
    assert len(_kept(Dart.Config(keep="30%", pivot_text=0))) == 3


def test_padding_is_neither_pivot_nor_retained() -> None:
    valid = torch.ones(1, 8, dtype=torch.bool)
    valid[0, 1] = False
    # without 1, the pivot is 3 (90 degrees): farthest are 6 (180 away), 7 (100), then 0 and 5 (90 away, so rounding decides: keep 3)
    assert _kept(Dart.Config(keep=3, pivot_image=1, pivot_text=0), valid=valid) == [3, 6, 7]


def test_text_pivots_at_the_projector_are_refused() -> None:
    with pytest.raises(ValueError, match="pivot_text: 4 needs text.*; set pivot_text: 0"):
        Dart.stages(Site.parse("projector"), Dart.Config(), FACTS)
    with pytest.raises(ValueError, match="at least one"):
        Dart.Config(pivot_image=0, pivot_text=0)
