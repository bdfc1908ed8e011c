"""The three position axes (time, row, column) of Qwen2-VL and Qwen2.5-VL prompts, in numpy.

Text counts up by one on all three axes at once. A picture's tokens share the time of its first token; row and column count from there, and
the text behind it continues at the largest position plus one. So positions run behind the token index, by the *rope delta*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tmc_export.core.errors import RuntimeInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MropePositions", "mrope_positions"]


@dataclass(frozen=True)
class MropePositions:
    """Positions of a prompt.

    Attributes:
        positions: int64 `[3, n]`: time, row, column.
        next_position: what the first token after the prompt gets on all three axes.
    """

    positions: NDArray[np.int64]
    next_position: int

    @property
    def delta(self) -> int:
        """The rope delta: the token of index j behind this prompt has position j + delta, as long as it is text."""
        return self.next_position - int(self.positions.shape[1])


def mrope_positions(group: NDArray[np.integer], grids: Sequence[tuple[int, int, int]], start: int = 0) -> MropePositions:
    """Positions of a prompt with pictures.

    Args:
        group: `[n]`: 0 for text, i + 1 for a token of picture i (what `expand_image_tokens` returns).
        grids: per picture (time, rows, columns) of its tokens *after* the merger; time is 1.
        start: the first position, for a later turn: the `next_position` of the turn before it, which its answer has moved on by its length.

    Returns:
        `MropePositions`, equal to transformers' `get_rope_index` for `start` 0.

    Raises:
        RuntimeInputError: a picture's tokens are not one run of time x rows x columns, or a grid of several frames.

    >>> mrope_positions(np.array([0, 1, 1, 1, 1, 0]), [(1, 2, 2)]).positions.tolist()
    [[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]]
    """
    group = np.asarray(group)
    positions = np.empty((3, group.shape[0]), dtype=np.int64)
    highest = int(group.max(initial=0))
    if highest > len(grids):
        raise RuntimeInputError(f"the prompt has tokens of picture {highest}, but {len(grids)} grids were given; give one grid per picture")
    # Runs of equal group: [begin, end) each.
    borders = np.flatnonzero(np.diff(group, prepend=-1, append=-1))
    expected, current = 1, start
    for begin, end in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
        number = int(group[begin])
        if number == 0:
            positions[:, begin:end] = np.arange(current, current + end - begin)
            current += end - begin
            continue
        time, rows, columns = grids[number - 1]
        if time != 1:
            raise RuntimeInputError(
                f"picture {number} has a grid of {time} frames; only still pictures are served, give frames as pictures"
            )
        if number != expected or end - begin != rows * columns:
            got = f"picture {number} has {end - begin} tokens at index {begin}"
            want = f"its grid is {rows} x {columns} and picture {expected} comes next"
            raise RuntimeInputError(f"{got}, but {want}; expand each placeholder to rows x columns tokens, in order")
        positions[0, begin:end] = current
        positions[1, begin:end] = current + np.repeat(np.arange(rows), columns)
        positions[2, begin:end] = current + np.tile(np.arange(columns), rows)
        current += max(rows, columns)
        expected += 1
    if expected <= len(grids):
        raise RuntimeInputError(f"{len(grids)} grids were given, but the prompt holds {expected - 1} pictures; give one grid per picture")
    return MropePositions(positions=positions, next_position=current)
