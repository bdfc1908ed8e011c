"""AWQ: channels that carry large activations get finer steps, by scaling them up before their weights are rounded.

Lin et al. 2024, arXiv 2306.00978, equations 4 and 5: `d = mean|X|^α`, α from a grid, the one whose products are nearest. Official code:
mit-han-lab/llm-awq, `awq/quantize/auto_scale.py`. It judges by the output of the attention or feed-forward that the linears belong to;
here the products themselves are compared. Its search for a narrower range (`auto_clip.py`) is not done: every block has the best of three
scales (`int4.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["GRID", "awq_divisors"]

GRID = 20
"""α is 0/20 to 19/20, as in the official code."""
_LEAST = 1e-4


def awq_divisors(rows: Array, means: Array, weights: Sequence[Array], block: int) -> Array:
    """Return what an input's channels are divided by.

    Args:
        rows: float32 `[n, K]`, some of the input.
        means: `[K]`, the mean magnitude of each channel.
        weights: float32 `[out, K]` of every linear that reads it; K a multiple of `block`.
        block: input channels that share a scale.

    Returns:
        float32 `[K]`, above 0; all 1 where no α beats plain rounding.
    """
    matrices = [np.ascontiguousarray(w.T, dtype=np.float32) for w in weights]
    best = np.ones(len(means), np.float32)
    least = _loss(rows, matrices, best, block)
    for step in range(1, GRID):
        found = _candidate(means, step / GRID)
        loss = _loss(rows, matrices, found, block)
        if loss < least:
            best, least = found, loss
    return best


def _candidate(means: Array, alpha: float) -> Array:
    found = np.maximum(means.astype(np.float64) ** alpha, _LEAST)
    result: Array = (found / np.sqrt(found.max() * found.min())).astype(np.float32)
    return result


def _loss(rows: Array, matrices: Sequence[Array], divisor: Array, block: int) -> float:
    """Squared difference of the products, summed."""
    total = 0.0
    for matrix in matrices:
        rounded = dequantize_blocks(*quantize_blocks(matrix * divisor[:, None], block)) / divisor[:, None]
        total += float(np.square(rows @ (rounded - matrix), dtype=np.float64).sum())
    return total
