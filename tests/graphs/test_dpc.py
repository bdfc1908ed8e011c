"""The DPC-KNN block against numbers worked out by hand, and what padding may not do."""

from __future__ import annotations

import math

import pytest
import torch

from tmc_export.graphs import _dpc

# 0, 1, 2, 10, 11, 13 on a line (one channel, so nothing is divided).
LINE = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]]])


def test_densities_of_the_line() -> None:
    # three nearest, self included; squares: 0+1+4, 0+1+1, 0+1+4, 0+1+9, 0+1+4, 0+4+9
    want = torch.tensor([[math.exp(-s / 3) for s in (5, 2, 5, 10, 5, 13)]])
    assert torch.allclose(_dpc.densities(_dpc.euclidean_distances(LINE), 3), want)


def test_densities_without_self_and_without_squares() -> None:
    # two nearest others: 1+2, 1+1, 1+2, 1+3, 1+2, 2+3
    want = torch.tensor([[math.exp(-s / 2) for s in (3, 2, 3, 4, 3, 5)]])
    got = _dpc.densities(_dpc.euclidean_distances(LINE), 2, with_self=False, squared=False)
    assert torch.allclose(got, want)


def test_separations_of_the_line() -> None:
    distances = _dpc.euclidean_distances(LINE)
    density = _dpc.densities(distances, 3)
    # 1 is the densest: the largest distance, 13. 0, 2 and 11 tie below it: distance to 1. 10 and 13 have 11 nearer than 1 (and 10 has 2).
    assert torch.allclose(_dpc.separations(distances, density), torch.tensor([[1.0, 13.0, 1.0, 1.0, 10.0, 2.0]]))


def test_clusters_and_means_of_the_line() -> None:
    found = _dpc.dpc_knn(_dpc.euclidean_distances(LINE), 2, 3)
    assert (found.centres.tolist(), found.assign.tolist()) == ([[1, 4]], [[0, 0, 0, 1, 1, 1]])
    means, mix = _dpc.cluster_means(LINE, found.assign, 2)
    assert torch.allclose(means, torch.tensor([[[1.0], [34 / 3]]])) and torch.allclose(mix @ LINE, means)


def test_a_centre_is_in_its_own_cluster_though_an_equal_token_leads_another() -> None:
    x = torch.tensor([[[0.0], [0.0], [5.0]]])
    # equal points 0 and 1: all densities of k=1 are 1, all separations 5: the centres are 0, 1, 2, each its own
    assert _dpc.dpc_knn(_dpc.euclidean_distances(x), 3, 1).assign.tolist() == [[0, 1, 2]]


def test_a_batch_item_has_its_own_largest_distance() -> None:
    both = torch.cat([LINE, LINE * 3])
    for item in range(2):
        alone = _dpc.centre_scores(_dpc.euclidean_distances(both[item : item + 1]), 3)
        assert torch.equal(_dpc.centre_scores(_dpc.euclidean_distances(both), 3)[item : item + 1], alone)


def test_padding_has_no_say() -> None:
    valid = torch.tensor([[True, True, True, True, True, True, False, False]])
    for filler in (1.0, 1000.0):
        padded = torch.cat([LINE, torch.full((1, 2, 1), filler)], dim=1)
        found = _dpc.dpc_knn(_dpc.euclidean_distances(padded), 2, 3, valid)
        assert (found.centres.tolist(), found.assign.tolist()) == ([[1, 4]], [[0, 0, 0, 1, 1, 1, -1, -1]])
    blind = _dpc.dpc_knn(_dpc.euclidean_distances(torch.cat([LINE, torch.full((1, 2, 1), 1000.0)], dim=1)), 2, 3)
    assert blind.assign.tolist() != [[0, 0, 0, 1, 1, 1, -1, -1]]


def test_fewer_valid_candidates_than_clusters() -> None:
    valid = torch.tensor([[True, False, True, False, False, False]])
    found = _dpc.dpc_knn(_dpc.euclidean_distances(LINE), 4, 3, valid)
    assert sorted(found.centres[0, :2].tolist()) == [0, 2]
    assert found.assign[0, 0] != found.assign[0, 2] and found.assign[0, [1, 3, 4, 5]].tolist() == [-1] * 4


def test_distances_have_an_exact_zero_diagonal() -> None:
    x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0)) * 100
    for distances in (_dpc.euclidean_distances(x), _dpc.cosine_distances(x)):
        assert bool((distances.diagonal(dim1=1, dim2=2) == 0).all()) and bool((distances >= 0).all())
    assert torch.allclose(_dpc.euclidean_distances(x), torch.cdist(x.double(), x.double()).float() / 8, atol=1e-2)
    apart = ~torch.eye(40, dtype=torch.bool)
    want = 1 - torch.nn.functional.cosine_similarity(x.unsqueeze(2), x.unsqueeze(1), dim=-1)
    assert torch.allclose(_dpc.cosine_distances(x)[:, apart], want[:, apart], atol=1e-6)


def test_too_many_clusters_or_neighbours_are_refused() -> None:
    distances = _dpc.euclidean_distances(LINE)
    with pytest.raises(ValueError, match="7 clusters of 6 candidates; use 1 to 6"):
        _dpc.dpc_knn(distances, 7, 3)
    with pytest.raises(ValueError, match="6 nearest neighbours among 6 candidates; use 1 to 5"):
        _dpc.densities(distances, 6, with_self=False)
