"""Bipartite matching: the even tokens look for a partner among the odd ones, and the most similar of them merge into it.

Shared by ToMe, AuroraCap and FOLDER. Padding weighs nothing, is nobody's partner while a valid one is left, and merges last.

Legend: b batch, n tokens, a = ceil(n/2) even ones, o = floor(n/2) odd ones, r pairs, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tmc_export.graphs._contract import Compressed

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Pairs", "absorb", "averages", "log_size", "match_pairs", "merge_pairs", "pair_rows"]

_APART = -1.0e30
_NEVER = -3.0e30


@dataclass(frozen=True)
class Pairs:
    """Who merges into whom.

    Attributes:
        kept: `[b, a-r]` even tokens that stay, counted among the even ones; by index when the first one is protected, else by falling
            similarity.
        merged: `[b, r]` even tokens that merge, by falling similarity, counted among the even ones.
        partner: `[b, r]` their partners, counted among the odd ones.
    """

    kept: Tensor
    merged: Tensor
    partner: Tensor


def match_pairs(metric: Tensor, r: int, valid: Tensor, *, protect: bool = False, penalty: Tensor | None = None) -> Pairs:
    """Pair even with odd tokens by the cosine of `metric` `[b, n, c]` (no epsilon), and choose the `r` best pairs.

    Args:
        metric: what is compared, in float32.
        r: pairs, at most `(n - protect) // 2`.
        valid: `[b, n]` bool.
        protect: token 0 never merges into another.
        penalty: `[b, n]` taken from the similarity of each even token.

    >>> import torch
    >>> metric = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [1.0, 0.0]]])
    >>> found = match_pairs(metric, 1, torch.ones(1, 4, dtype=torch.bool))
    >>> found.kept.tolist(), found.merged.tolist(), found.partner.tolist()
    ([[1]], [[0]], [[1]])
    """
    import torch

    from tmc_export.graphs._ops import argmax, complement, cosine, gather, top_in_order

    metric = metric.float()
    score = cosine(metric[:, 0::2], metric[:, 1::2])
    if penalty is not None:
        score = score - penalty[:, 0::2].float().unsqueeze(2)
    both = valid[:, 0::2].unsqueeze(2) & valid[:, 1::2].unsqueeze(1)
    score = torch.where(both, score, torch.full_like(score, _APART))
    best = score.amax(dim=2)
    if protect:
        best = torch.cat([torch.full_like(best[:, :1], _NEVER), best[:, 1:]], dim=1)
    order = top_in_order(best, best.shape[1])
    merged = order[:, :r]
    kept = complement(merged, best.shape[1]) if protect else order[:, r:]
    return Pairs(kept, merged, gather(argmax(score), merged))


def absorb(values: Tensor, weight: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return the odd tokens after their partners have joined, as averages by weight, and their weights; both float32.

    Args:
        values: `[b, n, c]`.
        weight: `[b, n]`, 0 for padding.
        pairs: of `match_pairs`.

    Returns:
        `[b, o, c]`: `sum(weight * x) / sum(weight)`, 0 where nothing has weight; and `[b, o]`: `sum(weight)`.
    """
    from tmc_export.graphs._ops import gather, one_hot

    onto = one_hot(pairs.partner, values.shape[1] // 2).transpose(1, 2)
    even, odd = gather(weight[:, 0::2], pairs.merged), weight[:, 1::2]
    total = odd + (onto @ even.unsqueeze(2)).squeeze(2)
    moved = onto @ (gather(values[:, 0::2], pairs.merged).float() * even.unsqueeze(2))
    mean = (values[:, 1::2].float() * odd.unsqueeze(2) + moved) / total.clamp_min(1e-30).unsqueeze(2)
    return mean, total


def pair_rows(pairs: Pairs, n: int) -> tuple[Tensor, Tensor]:
    """Return where tokens go when the kept even ones leave first and all odd ones after them.

    Returns:
        source `[b, n-r]`, the token each row takes the place of, and assign `[b, n]`, the row each token went into.
    """
    import torch

    b, stay = pairs.kept.shape
    odds = torch.arange(1, n, 2, device=pairs.kept.device)
    source = torch.cat([pairs.kept * 2, odds.expand(b, -1)], dim=1)
    row = torch.arange(source.shape[1], device=source.device).expand(b, -1)
    where = torch.cat([source, pairs.merged * 2], dim=1)
    return source, torch.zeros_like(where).scatter(1, where, torch.cat([row, pairs.partner + stay], dim=1))


def log_size(size: Tensor) -> Tensor:
    """Return log(size) with 0 for padding, whose attention the validity already masks."""
    return size.clamp_min(1.0).log()


def averages(assign: Tensor, weight: Tensor, k: int) -> Tensor:
    """Return the averages by weight `[b, n]` of the candidates in each of k rows as a matrix `[b, k, n]`; a row without weight is 0."""
    from tmc_export.graphs._ops import one_hot

    mix = one_hot(assign, k).transpose(1, 2) * weight.unsqueeze(1)
    return mix / mix.sum(dim=2, keepdim=True).clamp_min(1e-30)


def merge_pairs(tokens: Tensor, size: Tensor, pairs: Pairs, valid: Tensor) -> Compressed:
    """Average pairs by size, as ToMe does: `[b, n, c]` to `[b, n-r, c]`, the remaining even tokens, then the odd ones.

    The new sizes leave as the state `size` `[b, n-r]`, their logarithms as the key bias.
    """
    import torch

    from tmc_export.graphs._ops import gather

    weight = torch.where(valid, size, torch.zeros_like(size))
    odd, odd_size = absorb(tokens, weight, pairs)
    out = torch.cat([gather(tokens[:, 0::2], pairs.kept), odd.to(tokens.dtype)], dim=1)
    new_size = torch.cat([gather(weight[:, 0::2], pairs.kept), odd_size], dim=1)
    source, assign = pair_rows(pairs, tokens.shape[1])
    mix = averages(assign, weight, source.shape[1])
    return Compressed(out, source, new_size > 0, assign=assign, mix=mix, state={"size": new_size}, key_bias=log_size(new_size))
