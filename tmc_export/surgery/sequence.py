"""What leaves the stages of a cut, and the sequence put together again: static shapes, no sort, nothing that depends on the data.

A token that leaves a cut has a *place*, the token of S whose place in the conversation it takes (what it sees and who sees it hangs on
that), and an *origin*, the token of S whose rotary position it takes. Both are its own where it comes from a candidate. A synthetic token
(source -1) stands behind the kept ones of its picture and has the origin of the last candidate. Places stay distinct and ascending: with n
candidates and k tokens that leave, token j has its own place, but at most that of candidate n - k + j, and a synthetic one exactly that. So
a kept token moves only where synthetic ones would have no room behind it, never to a later place, never out of its picture's range.

Legend: b batch, m pictures of v candidates, f pictures (1 under `scope: joint`), n candidates of one of them, k tokens that leave, S tokens
of the turn, S' behind the cut, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tmc_export.graphs._contract import Compressed
from tmc_export.surgery.stages import gather_rows

__all__ = ["EMPTY", "SYNTHETIC", "Candidates", "arriving", "assemble", "leave", "members"]

EMPTY, SYNTHETIC = -1, -2
"""What `kept.<n>` holds for a row without a token (fewer pictures than the bucket) and for a token that comes from no candidate."""


@dataclass(frozen=True)
class Candidates:
    """The visual tokens that are left after some of a cut's stages.

    Attributes:
        tokens: `[b, m·v, c]`.
        place, origin: `[b, m·v]` in S, see above.
        alive: `[b, m·v]`.
        index: `[b, m·v]` among those that arrived at the cut, `SYNTHETIC` for a token that a stage of this cut made.
    """

    tokens: Tensor
    place: Tensor
    origin: Tensor
    alive: Tensor
    index: Tensor

    def report(self) -> Tensor:
        """Return `kept.<n>`: index where there is a token, `EMPTY` elsewhere."""
        return torch.where(self.alive, self.index, EMPTY)


def arriving(hidden: Tensor, candidates: Tensor, alive: Tensor) -> Candidates:
    """Return the candidates of a turn: their places `[b, m·v]` in `hidden [b, S, c]`, and which of them there are."""
    index = torch.arange(candidates.shape[1]).expand(candidates.shape)
    return Candidates(gather_rows(hidden, candidates), candidates, candidates, alive, index)


def leave(before: Candidates, result: Compressed, fold: int) -> Candidates:
    """Move places, origins and indices along with what a stage returned.

    Args:
        before: what the stage saw, all pictures side by side.
        result: `[b·f, k, …]`.
        fold: f.
    """
    rows, kept = result.source.shape

    def folded(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows, tensor.shape[1] // fold)

    def unfolded(tensor: Tensor) -> Tensor:
        return tensor.reshape(rows // fold, fold * kept, *tensor.shape[2:])

    alive, real = folded(before.alive), result.source >= 0
    rank = alive.long().cumsum(1) - 1
    count = rank[:, -1:] + 1
    leaving = result.valid & (result.valid.long().cumsum(1) <= count)  # a method cannot make more places than there are
    latest = count - leaving.long().sum(1, keepdim=True) + leaving.long().cumsum(1) - 1
    wanted = torch.where(real, torch.minimum(gather_rows(rank, result.source), latest), latest)
    chosen = _at_rank(rank, alive, wanted)
    last = _at_rank(rank, alive, count - 1)
    origin, index = folded(before.origin), folded(before.index)
    return Candidates(
        unfolded(result.tokens),
        unfolded(folded(before.place).gather(1, chosen)),
        unfolded(torch.where(real, gather_rows(origin, result.source), origin.gather(1, last))),
        unfolded(leaving),
        unfolded(torch.where(real, gather_rows(index, result.source), SYNTHETIC)),
    )


def _at_rank(rank: Tensor, alive: Tensor, wanted: Tensor) -> Tensor:
    """Return the candidate of each wanted rank among the live ones: `[·, n]`, `[·, k]` → `[·, k]`; 0 where there is none."""
    same = (rank[:, None, :] == wanted[:, :, None]) & alive[:, None, :]
    return (same.long() * torch.arange(rank.shape[1])).sum(-1)


def assemble(hidden: Tensor, text: Tensor, left: Candidates | None, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Put text and what is left of the pictures back in order: places are counted.

    Args:
        hidden: `[b, S, c]`.
        text: `[b, S]` bool.
        left: the visual tokens; None when none are left.
        size: S'.

    Returns:
        Tokens `[b, S', c]`, then origin and place in S and whether there is a token, `[b, S']`.
    """
    count = hidden.shape[1]
    stays = text if left is None else text | members(left.place, left.alive, count)
    rank = stays.long().cumsum(1)
    target = torch.arange(size)
    place = (rank[:, None, :] <= target[None, :, None]).long().sum(-1).clamp(max=count - 1)
    valid = target[None] < rank[:, -1:]
    if left is None:
        origin, merged = place.clone(), gather_rows(hidden, place)  # a value of its own, for an output of its own
    else:
        same = (left.place[:, None, :] == place[:, :, None]) & left.alive[:, None, :]
        row = (same.long() * torch.arange(left.place.shape[1])).sum(-1)
        visual = same.any(-1)
        origin = torch.where(visual, left.origin.gather(1, row), place)
        merged = gather_rows(torch.cat([hidden, left.tokens.to(hidden.dtype)], 1), torch.where(visual, count + row, place))
    return torch.where(valid[:, :, None], merged, 0.0).to(hidden.dtype), origin, place, valid


def members(place: Tensor, alive: Tensor, count: int) -> Tensor:
    """Which of `count` places occur among the live ones: `[b, k]` → bool `[b, count]`."""
    return ((place[:, None, :] == torch.arange(count)[None, :, None]) & alive[:, None, :]).any(-1)
