"""The reference's tokens of a turn, and what becomes of their sequence at a cut, in plain lists and loops.

Legend: T tokens, n candidates of a picture (of all, under `scope: joint`), k tokens that leave, c channels, r rotary axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tmc_export.core.errors import ExportError
from tmc_export.graphs._contract import Compressed

__all__ = ["Tokens", "leave", "number_candidates", "rows_that_leave", "side_by_side"]


@dataclass(frozen=True)
class Tokens:
    """The tokens of a turn at one depth.

    Attributes:
        hidden: `[1, T, c]`.
        positions: `[r, 1, T]` rotary positions.
        order: `[T]` places in the conversation.
        group: `[T]` 0 text, else the picture's number within the turn.
        source: `[T]` original index among the picture's uncompressed tokens (text and synthetic tokens: -1).
        arrival: `[T]` index among the picture's tokens (all pictures', at a cut with a joint stage) as they reached the last cut; -1 for
            a token that a stage of that cut made.
        column: `[T]` index among the turn's tokens as they reached the last cut; for a token made there, of the one it has its position
            from.
        joint: a stage saw all pictures at once, so that budgets per picture have no meaning any more.
    """

    hidden: Tensor
    positions: Tensor
    order: Tensor
    group: Tensor
    source: Tensor
    arrival: Tensor
    column: Tensor
    joint: bool = False

    def take(self, rows: Tensor) -> Tokens:
        """Return the tokens at `rows`."""
        return replace(
            self,
            hidden=self.hidden[:, rows],
            positions=self.positions[:, :, rows],
            order=self.order[rows],
            group=self.group[rows],
            source=self.source[rows],
            arrival=self.arrival[rows],
            column=self.column[rows],
        )


def rows_that_leave(result: Compressed, count: int, where: str) -> tuple[Tensor, list[int]]:
    """Return the rows of a result `[1, k, …]` that hold a token, and their sources.

    Args:
        result: of a stage.
        count: n, without padding. No more than n tokens leave: there are no more places.
        where: method and site, for the message.

    Raises:
        ExportError: sources that do not rise, or a synthetic token that is not behind the kept ones.
    """
    rows = torch.nonzero(result.valid[0])[:, 0][:count]
    listed: list[int] = result.source[0][rows].tolist()
    kept = [i for i in listed if i >= 0]
    if listed[: len(kept)] != kept or any(b <= a for a, b in zip(kept[:-1], kept[1:], strict=True)):
        raise ExportError(
            f"{where} returned sources that do not rise; in the decoder a token takes the place of its candidate, and synthetic ones (-1) "
            "come behind all others"
        )
    return rows, listed


def leave(tokens: Tokens, rows: Tensor, listed: Sequence[int], values: Tensor) -> Tokens:
    """Return the tokens that take the places of the candidates at `rows`.

    The j-th of k has its own place, but at most that of candidate n - k + j; a synthetic one has exactly that. A synthetic token has the
    rotary position of the last candidate.

    Args:
        tokens: the turn.
        rows: `[n]` of the candidates in it.
        listed: k sources, -1 = synthetic.
        values: `[1, k, c]`.
    """
    count, leaving = rows.shape[0], len(listed)
    places, origins = [], []
    for number, source in enumerate(listed):
        latest = count - leaving + number
        places.append(latest if source < 0 else min(source, latest))
        origins.append(count - 1 if source < 0 else source)
    synthetic = torch.tensor([source < 0 for source in listed], dtype=torch.bool)
    found = tokens.take(rows[torch.tensor(origins, dtype=torch.int64)])
    return replace(
        found,
        hidden=values.to(tokens.hidden.dtype),
        order=tokens.order[rows[torch.tensor(places, dtype=torch.int64)]],
        source=torch.where(synthetic, -1, found.source),
        arrival=torch.where(synthetic, -1, found.arrival),
    )


def side_by_side(pieces: Sequence[Tokens]) -> Tokens:
    """Put pieces of a turn together, in the order of their places."""
    first = pieces[0]
    whole = replace(
        first,
        hidden=torch.cat([p.hidden for p in pieces], 1),
        positions=torch.cat([p.positions for p in pieces], 2),
        order=torch.cat([p.order for p in pieces]),
        group=torch.cat([p.group for p in pieces]),
        source=torch.cat([p.source for p in pieces]),
        arrival=torch.cat([p.arrival for p in pieces]),
        column=torch.cat([p.column for p in pieces]),
    )
    return whole.take(whole.order.argsort())


def number_candidates(group: Tensor, joint: bool) -> Tensor:
    """Number every visual token within its picture, or within all of them: `[T]`."""
    if joint:
        return (group > 0).long().cumsum(0) - 1
    found = torch.zeros_like(group)
    for picture in {int(g) for g in group if g > 0}:
        mine = group == picture
        found[mine] = torch.arange(int(mine.sum()))
    return found
