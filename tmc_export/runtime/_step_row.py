"""What a decode step says of its one token besides the hidden state, in arrays that stay.

Legend: r rotary axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["StepRow", "cells"]


def cells(array: Array) -> memoryview[int]:
    """The elements of an int64 or bool array, to be set one by one: right after a graph has run, numpy's own way is felt."""
    octets = array.data.cast("B")
    return octets if array.dtype == np.bool_ else octets.cast("q")


class StepRow:
    """What a block's decode graph reads of the new token besides `hidden`, in arrays that stay from token to token.

    Args:
        axes: of rotary positions.

    Attributes:
        arrays: by the name of the input: `positions` int64 `[r, 1, 1]`; `order` and `since` int64, `valid` and `text` bool `[1, 1]`;
            `last` int64 `[1]`. A graph takes those that it names.
    """

    def __init__(self, axes: int) -> None:
        integers = {"positions": (axes, 1, 1), "order": (1, 1), "since": (1, 1), "last": (1,)}
        self.arrays: dict[str, Array] = {name: np.zeros(shape, np.int64) for name, shape in integers.items()}
        self.arrays |= {name: np.ones((1, 1), np.bool_) for name in ("valid", "text")}
        self._positions, self._order, self._since = (cells(self.arrays[name]) for name in ("positions", "order", "since"))

    def fill(self, position: int, order: int, since: int) -> None:
        """Set the token's position, the same on all axes, its place in the conversation, and the first place that it sees."""
        for axis in range(len(self._positions)):
            self._positions[axis] = position
        self._order[0], self._since[0] = order, since
