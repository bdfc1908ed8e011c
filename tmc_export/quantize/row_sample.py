"""Some rows of a linear's input, each as likely as any other, in memory that does not grow with the samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["RowSample"]


class RowSample:
    """A reservoir of rows (J. S. Vitter, "Random sampling with a reservoir", 1985, algorithm R); the draw is always the same.

    Args:
        size: rows that are kept.
        channels: K.

    Attributes:
        seen: rows that came.
    """

    def __init__(self, size: int, channels: int) -> None:
        self._rows = np.zeros((size, channels), np.float32)
        self._draw = np.random.default_rng(0)
        self.seen = 0

    @property
    def rows(self) -> Array:
        """Those kept: float32 `[n, K]`."""
        return self._rows[: self.seen]

    def add(self, rows: Array) -> None:
        """Take rows `[n, K]`."""
        size = len(self._rows)
        free = max(0, min(size - self.seen, len(rows)))
        self._rows[self.seen : self.seen + free] = rows[:free]
        self.seen += free
        rest = rows[free:]
        places = self._draw.integers(0, self.seen + 1 + np.arange(len(rest)))
        for place, row in zip(places.tolist(), rest, strict=True):
            if place < size:
                self._rows[place] = row
        self.seen += len(rest)
