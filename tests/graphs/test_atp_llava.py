"""ATP-LLaVA by hand: four tokens on a 2 x 2 raster, one channel, weights that make the thresholds round numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tests.goldens.adapters._context import context, facts, layout
from tmc_export.graphs._contract import Attention, Budget, Compressed, Site, Stage
from tmc_export.graphs.atp_llava import ATPLLaVA, margins, spatial_scores

MADE = facts(decoder_layers=8)
MODEL = replace(MADE, decoder=replace(MADE.decoder, width=1))
CONFIG = ATPLLaVA.Config(keep=(Budget(tokens=2),), layers=(2,), strides=(2,))
LOG3 = math.log(3.0)  # sigmoid(log 3) = 0.75, sigmoid(-log 3) = 0.25
SUMS = {"visual": [0.4, 0.8, 1.2, 1.6], "text": [0.4, 0.8, 0.2, 0.6]}  # over 4 visual rows and over 2 text rows


def run(redundant: float = 0.0, redundant_bias: float = 0.0, spatial_bias: float = 0.0) -> tuple[Compressed, list[float]]:
    stage: Stage = ATPLLaVA.stages(Site("decoder", 2), CONFIG, MODEL)[0]
    tokens = torch.arange(4).float().reshape(1, 4, 1)
    captured = {need: torch.tensor([SUMS[need.rows]]) for need in stage.needs if isinstance(need, Attention)}
    weights = {
        "score_projection.weight": [[1.0, 1.0]],
        "score_projection.bias": [0.0],
        "redundant_threshold_head.weight": [[redundant]],
        "redundant_threshold_head.bias": [redundant_bias],
        "spatial_threshold_head.weight": [[0.0]],
        "spatial_threshold_head.bias": [spatial_bias],
    }
    made = {f"atp.2.{name}": torch.tensor(value) for name, value in weights.items()}
    assert {name: tuple(value.shape) for name, value in made.items()} == dict(ATPLLaVA.weights(CONFIG, MODEL))
    here = replace(
        context(tokens, layout(4, 1, grid=(2, 2)), MODEL, captured), weights=made, text_valid=torch.tensor([[True, False, True]])
    )
    spatial = spatial_scores((2, 2), CONFIG.strides, CONFIG.scale)
    return ATPLLaVA.apply(stage, tokens, here, CONFIG), margins(stage, here, spatial)[0].tolist()


def test_the_nearer_threshold_decides() -> None:
    # self 0.1 0.2 0.3 0.4, cross 0.2 0.4 0.1 0.3, redundancy 0.15 0.3 0.2 0.35; spatial 1 - 3/4 = 0.25 for token 0, 1 - 3 = -2 else
    # both thresholds sigmoid(0) = 0.5: token 0 is nearer to the spatial one
    out, found = run()
    assert found == pytest.approx([-0.25, -0.2, -0.3, -0.15], abs=1e-6)
    assert out.source.tolist() == [[1, 3]]


def test_a_lower_spatial_threshold_lets_the_sampled_token_in() -> None:
    out, found = run(spatial_bias=-LOG3)  # 0.25
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    assert out.source.tolist() == [[0, 3]]


def test_the_threshold_depends_on_the_mean_scores() -> None:
    # z = mean self + mean cross = 0.25 + 0.25; 2 log 3 * z = log 3, so theta_r = 0.75 and token 3 is 0.4 below it
    out, found = run(redundant=2.0 * LOG3)
    assert found == pytest.approx([-0.25, -0.45, -0.55, -0.4], abs=1e-6)
    assert out.source.tolist() == [[0, 3]]
    assert out.state["spatial"].tolist() == [[0.25, -2.0]]


def test_the_largest_stride_that_takes_a_token_counts() -> None:
    # 1 x 7: 0 is taken by 4, 3 and 2; 2 and 6 by 2 (6 by 3 too), 3 by 3, 4 by 4, 1 and 5 by none
    quarter, third, fourth = 1 - 3 / 4, 1 - 3 / 9, 1 - 3 / 16
    assert spatial_scores((1, 7), (2, 3, 4), 3.0)[0].tolist() == pytest.approx([fourth, -2, quarter, third, fourth, -2, third], abs=1e-6)


def test_no_raster_is_refused() -> None:
    stage = ATPLLaVA.stages(Site("decoder", 2), CONFIG, MODEL)[0]
    with pytest.raises(ValueError, match="needs a raster"):
        ATPLLaVA.layout(stage, layout(4, 1), CONFIG, MODEL)
