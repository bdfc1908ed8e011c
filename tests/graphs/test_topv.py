"""TopV's costs, Sinkhorn's iterations and the even spread, on cases worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tmc_export.graphs._sinkhorn import sinkhorn
from tmc_export.graphs._synthetic import contexts
from tmc_export.graphs.topv import TopV, costs, spread

HALF = torch.full((1, 2), 0.5)


def test_one_iteration_by_hand() -> None:
    # cost [[0, 1], [0, 0]], epsilon 1: K = [[1, e], [1, 1]] with e = exp(-1). From u = (1, 1): K^T u = (2, 1 + e), v = .5 / that;
    # K v = (v1 + e v2, v1 + v2), u = .5 / that;  K^T u = (u1 + u2, e u1 + u2), v = .5 / that;  P = diag(u) K diag(v)
    e = math.exp(-1)
    v1, v2 = 0.25, 0.5 / (1 + e)
    u1, u2 = 0.5 / (v1 + e * v2), 0.5 / (v1 + v2)
    v1, v2 = 0.5 / (u1 + u2), 0.5 / (e * u1 + u2)
    want = torch.tensor([[[u1 * v1, u1 * e * v2], [u2 * v1, u2 * v2]]])
    got = sinkhorn(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), HALF, HALF, 1.0, 1)
    assert torch.allclose(got, want, atol=1e-6)
    # columns are met, rows are not: the second source, from which everything is near, gives more
    assert torch.allclose(got.sum(dim=1), HALF, atol=1e-6) and got[0, 1].sum() > 0.5 > got[0, 0].sum()


def test_without_iterations_every_column_is_a_softmax() -> None:
    e = math.exp(-1)
    got = sinkhorn(torch.tensor([[[0.0, 1.0], [0.0, 0.0]]]), HALF, HALF, 1.0, 0)
    assert torch.allclose(got, torch.tensor([[[0.25, 0.5 * e / (1 + e)], [0.25, 0.5 / (1 + e)]]]))


def test_a_cost_of_the_source_alone_cancels() -> None:
    cost = torch.tensor([[[0.3], [1.0], [0.0]]]).expand(1, 3, 3)
    third = torch.full((1, 3), 1 / 3)
    assert torch.allclose(sinkhorn(cost, third, third, 0.1, 1).sum(dim=2), third, atol=1e-6)
    assert sinkhorn(cost, third, third, 0.1, 0).sum(dim=2).argmax() == 2


def test_many_iterations_meet_both_margins() -> None:
    cost = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0))
    ninth = torch.full((2, 9), 1 / 9)
    plan = sinkhorn(cost, ninth, ninth, 0.1, 200)
    assert torch.allclose(plan.sum(dim=1), ninth, atol=1e-5) and torch.allclose(plan.sum(dim=2), ninth, atol=1e-5)


def test_mass_of_nothing_moves_nothing() -> None:
    mass = torch.tensor([[0.5, 0.5, 0.0]])
    for filler in (0.0, 2.0):
        cost = torch.full((1, 3, 3), filler)
        cost[:, :2, :2] = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        plan = sinkhorn(cost, mass, mass, 1.0, 1)
        assert torch.allclose(plan[:, :2, :2], sinkhorn(cost[:, :2, :2], HALF, HALF, 1.0, 1))
        assert bool((plan[:, 2] == 0).all()) and bool((plan[:, :, 2] == 0).all())


def test_too_small_an_epsilon_is_refused() -> None:
    with pytest.raises(ValueError, match=r"epsilon: 0\.01.*; use at least 0\.05"):
        sinkhorn(torch.zeros(1, 2, 2), HALF, HALF, 0.01, 3)


def test_costs_by_hand() -> None:
    # a raster of 1 x 3, centre at 1; alpha 1, beta 1, gamma .5, sigma 1
    config = TopV.Config(gamma=0.5, sigma=1.0)
    before = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    after = torch.tensor([[[5.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    features = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.0], [0.0, 1.0, 0.5]])  # (1 - cos) / 2
    one, two = 1 - math.exp(-0.5), 1 - math.exp(-2.0)
    near = torch.tensor([[0.0, one, two], [one, 0.0, one], [two, one, 0.0]])
    centre = torch.tensor([[0.5], [0.0], [0.5]])  # by source
    valid = torch.ones(1, 3, dtype=torch.bool)
    assert torch.allclose(costs(before, after, (1, 3), valid, config), (features + near + centre).unsqueeze(0), atol=1e-6)


def test_only_the_centre_decides() -> None:
    # equal features and no reach on the raster: sources differ by the centre alone, and the nearest to it matter most; raster 8 x 8
    config = TopV.Config(keep=4, recover=0.0, beta=0.0, gamma=1.0, iterations=0)
    (_, (stage, tokens, context)) = list(contexts(TopV, config, "decoder.3"))
    same = torch.ones_like(tokens)
    kept = TopV.apply(stage, same, replace(context, state={"before": same}), config).source
    assert kept.tolist() == [[27, 28, 35, 36]]  # rows 3 and 4, columns 3 and 4


def test_recovered_tokens_are_spread_over_the_others() -> None:
    config = TopV.Config(keep=8, recover=0.5, beta=0.0, gamma=1.0, iterations=0)
    (_, (stage, tokens, context)) = list(contexts(TopV, config, "decoder.3"))
    same = torch.ones_like(tokens)
    kept = TopV.apply(stage, same, replace(context, state={"before": same}), config).source
    # 60 others, 4 recovered: the 15th, 30th, 45th and 60th of them. Without 27, 28, 35, 36 these are 14, 31, 48, 63
    assert kept.tolist() == [sorted([27, 28, 35, 36, 14, 31, 48, 63])]


def test_spread_counts_only_what_is_there() -> None:
    present = torch.tensor([[True, False, True, True, False, True]])
    assert spread(present, 2).tolist() == [[False, False, True, False, False, True]]
    assert spread(present, 4).tolist() == present.tolist() == spread(present, 6).tolist()
