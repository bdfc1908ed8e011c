"""The DPC-KNN block: clusters around the tokens that are dense and far from anything denser.

Shared by Chat-UniVi, SparseVLM's recycling and the video methods that merge by clusters. What the official variants leave to chance or to
rounding is fixed here: no noise on the densities, a token is exactly 0 from itself, first index on ties. The densest token takes
the largest distance of its own batch item.

Padding has no say: it is nobody's neighbour, gives nobody a distance, comes last among the centres and joins no cluster.

Legend: b batch, n candidates, k centres, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Clusters", "centre_scores", "cluster_means", "cosine_distances", "densities", "dpc_knn", "euclidean_distances", "separations"]

_FAR = 1.0e18
"""Stands for the distance of padding; its square is still a float32."""


@dataclass(frozen=True)
class Clusters:
    """Clusters of one call.

    Attributes:
        centres: `[b, k]` int64, the candidate at the middle of each cluster, best score first.
        assign: `[b, n]` int64, the cluster of each candidate; -1 for padding.
    """

    centres: Tensor
    assign: Tensor


def euclidean_distances(x: Tensor) -> Tensor:
    """Return `|x_i - x_j| / sqrt(c)` `[b, n, n]` float32 for `x` `[b, n, c]`; the diagonal is exactly 0.

    From `|a|^2 + |b|^2 - 2 a b`: one matrix product, with an error of about 1e-7 of the squared norms.

    >>> import torch
    >>> euclidean_distances(torch.tensor([[[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]])).tolist()
    [[[0.0, 1.0], [1.0, 0.0]]]
    """
    import torch

    x = x.float()
    square = (x * x).sum(dim=2)
    squares = (square.unsqueeze(2) + square.unsqueeze(1) - 2.0 * (x @ x.transpose(1, 2))).clamp_min(0.0)
    apart = 1.0 - torch.eye(x.shape[1], device=x.device)
    root: float = x.shape[2] ** 0.5
    return squares.sqrt() * apart / root


def cosine_distances(x: Tensor, eps: float = 0.0) -> Tensor:
    """Return `1 - cos(x_i, x_j)` `[b, n, n]` float32 for `x` `[b, n, c]`, at least 0; the diagonal is exactly 0."""
    import torch

    from tmc_export.graphs._ops import cosine

    apart = 1.0 - torch.eye(x.shape[1], device=x.device)
    return (1.0 - cosine(x, x, eps)).clamp_min(0.0) * apart


def densities(distances: Tensor, neighbours: int, valid: Tensor | None = None, *, with_self: bool = True, squared: bool = True) -> Tensor:
    """Return `exp(-mean of the nearest distances)` `[b, n]` for distances `[b, n, n]`.

    Args:
        distances: `[b, n, n]`, 0 on the diagonal.
        neighbours: how many of the nearest are averaged; with fewer valid candidates, all of them.
        valid: `[b, n]` bool, false for padding.
        with_self: the token itself, at distance 0, is one of the nearest.
        squared: average the squares of the distances.

    Raises:
        ValueError: there are not that many candidates.
    """
    import torch

    n = distances.shape[1]
    if not 1 <= neighbours <= n - (not with_self):
        raise ValueError(f"{neighbours} nearest neighbours among {n} candidates; use 1 to {n - (not with_self)}")
    far = distances if valid is None else torch.where(valid.unsqueeze(1), distances, torch.full_like(distances, _FAR))
    if not with_self:
        far = far + torch.eye(n, device=far.device) * _FAR
    nearest = torch.topk(far, neighbours, dim=2, largest=False).values
    seen = (nearest < _FAR / 2).float()
    nearest = nearest * seen
    total = (nearest * nearest if squared else nearest).sum(dim=2)
    return (-total / seen.sum(dim=2).clamp_min(1.0)).exp()


def separations(distances: Tensor, density: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the distance `[b, n]` to the nearest strictly denser candidate; for the densest the largest distance of the item."""
    import torch

    denser = density.unsqueeze(1) > density.unsqueeze(2)
    both = distances
    if valid is not None:
        denser = denser & valid.unsqueeze(1)
        both = distances * (valid.unsqueeze(1) & valid.unsqueeze(2)).float()
    largest = both.amax(dim=(1, 2), keepdim=True)
    return torch.where(denser, distances, largest.expand_as(distances)).amin(dim=2)


def centre_scores(
    distances: Tensor, neighbours: int, valid: Tensor | None = None, *, with_self: bool = True, squared: bool = True
) -> Tensor:
    """Return `density * separation` `[b, n]`, the score that centres are chosen by; see `densities`."""
    density = densities(distances, neighbours, valid, with_self=with_self, squared=squared)
    return density * separations(distances, density, valid)


def dpc_knn(
    distances: Tensor,
    count: int,
    neighbours: int,
    valid: Tensor | None = None,
    *,
    with_self: bool = True,
    squared: bool = True,
) -> Clusters:
    """Cluster candidates around the `count` best centres, in order of score.

    Each candidate joins the nearest centre, the first on ties; a centre is always in its own cluster.

    Args:
        distances: `[b, n, n]` of `euclidean_distances` or `cosine_distances`.
        count: clusters; with fewer valid candidates, the last clusters are padding.
        neighbours: neighbours that the density looks at.
        valid: `[b, n]` bool, false for padding.
        with_self: see `densities`.
        squared: see `densities`.

    Raises:
        ValueError: more clusters or neighbours than candidates.

    >>> import torch
    >>> line = torch.tensor([[[0.0], [1.0], [2.0], [10.0], [11.0], [13.0]]])
    >>> found = dpc_knn(euclidean_distances(line), count=2, neighbours=3)
    >>> found.centres.tolist(), found.assign.tolist()
    ([[1, 4]], [[0, 0, 0, 1, 1, 1]])
    """
    import torch

    from tmc_export.graphs._ops import argmax, gather, one_hot, top_in_order

    n = distances.shape[1]
    if not 1 <= count <= n:
        raise ValueError(f"{count} clusters of {n} candidates; use 1 to {n}")
    score = centre_scores(distances, neighbours, valid, with_self=with_self, squared=squared)
    centres = top_in_order(score, count, valid)
    to_centre = gather(distances, centres)
    if valid is not None:
        to_centre = torch.where(gather(valid, centres).unsqueeze(2), to_centre, torch.full_like(to_centre, _FAR))
    nearest = argmax(-to_centre.transpose(1, 2))
    own = one_hot(centres, n)
    row = torch.arange(count, device=centres.device).float().unsqueeze(1)
    assign = torch.where(own.amax(dim=1) > 0, (own * row).sum(dim=1).long(), nearest)
    if valid is not None:
        assign = torch.where(valid, assign, torch.full_like(assign, -1))
    return Clusters(centres, assign)


def cluster_means(tokens: Tensor, assign: Tensor, count: int, eps: float = 0.0) -> tuple[Tensor, Tensor]:
    """Average the members of each cluster: tokens `[b, count, c]` and the map `[b, count, n]` that made them, both float32.

    Args:
        tokens: `[b, n, c]`.
        assign: `[b, n]` of `dpc_knn`; -1 joins nothing.
        count: clusters.
        eps: added to the number of members, as the official code of Chat-UniVi and SparseVLM does (1e-6); an empty cluster is 0.
    """
    from tmc_export.graphs._ops import one_hot

    member = one_hot(assign, count).transpose(1, 2)
    mix = member / (member.sum(dim=2, keepdim=True) + max(eps, 1e-30))
    return mix @ tokens.float(), mix
