"""A turn on its way through the decoder.

Legend: n tokens of the turn where it stands, r rotary axes, c channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.runtime._backend import Held, Rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Flow"]


@dataclass
class Flow:
    """What moves from block to block, unpadded."""

    hidden: Rows  # n of [1, n, c]
    positions: Array  # [r, n]
    order: Array  # [n]
    group: Array  # [n]
    next_position: int
    states: dict[str, Held]  # past_state.<entry>.<name> of the turn's pictures
    sums: dict[str, Array] = field(default_factory=dict)  # sums.<l>.<n> [1, …, n] of the block that ran last
    since: Array = field(default_factory=lambda: np.zeros(0, np.int64))  # [n] first place each token sees; where pictures have a barrier

    @property
    def count(self) -> int:
        return int(self.order.shape[0])

    @property
    def pictures(self) -> bool:
        return bool((self.group > 0).any())

    def truncate(self, arrived: Array) -> None:
        """Take the first of the positions `[r, n]` that arrived, in their order."""
        self.positions = arrived[:, : self.count]
        self.next_position = int(self.positions.max()) + 1

    def renumber(self, start: int) -> None:
        """Count the positions on from `start` without gaps."""
        self.positions = np.broadcast_to(start + np.arange(self.count), self.positions.shape)
        self.next_position = start + self.count
