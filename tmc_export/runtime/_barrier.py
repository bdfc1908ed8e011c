"""From which place of the conversation on a token sees: behind a picture with a barrier, nothing before the barrier.

Legend: n tokens of the turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["since_of"]


def since_of(group: Array, order: Array, barrier: int, before: int) -> tuple[Array, int]:
    """Return the first place each token sees, and the first that what follows the turn sees.

    Args:
        group: `[n]` 0 for text, else the picture's number.
        order: `[n]` places in the conversation.
        barrier: tokens at the end of every picture that hide what stands before them; 0: nothing is hidden.
        before: what the conversation so far hides: the first place that is seen.

    >>> since_of(np.array([0, 1, 1, 1, 0, 0]), np.arange(10, 16), 2, 0)[0].tolist()
    [0, 0, 0, 0, 12, 12]
    """
    found, following = np.full(group.shape[0], before, np.int64), before
    for picture in range(1, int(group.max(initial=0)) + 1 if barrier else 0):
        rows = np.flatnonzero(group == picture)
        if rows.size:
            following = int(order[rows[-barrier]])
            found[rows[-1] + 1 :] = following
    return found, following
