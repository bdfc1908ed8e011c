"""AWQ: channels that carry large activations get finer steps, by scaling them up before their weights are rounded.

Lin et al. 2024, arXiv 2306.00978, equations 4 and 5: `d = mean|X|^α`, α from a grid, the one whose products are nearest; then every block
of a weight gets the range, up to half of it cut off, whose products are nearest. Official code: mit-han-lab/llm-awq,
`awq/quantize/auto_scale.py` and `auto_clip.py`. The first judges by the output of the attention or feed-forward that the linears belong to;
here the products themselves are compared. The second clips weights and leaves queries and keys alone; here the range gives the block its
scale, for all linears.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.quantize.int4 import dequantize_blocks, quantize_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["GRID", "SHRINKS", "awq_blocks", "awq_divisors"]

GRID = 20
"""α is 0/20 to 19/20, as in the official code."""
SHRINKS = tuple(1 - step / 20 for step in range(11))
"""Shares of a block's range that its largest code may stand for, as in the official code."""
_LEAST = 1e-4
_SLAB = 1 << 20
"""Weights worked on at a time, so that temporaries stay small beside the matrix."""


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


def awq_blocks(products: Array, weight: Array) -> tuple[Array, Array]:
    """Quantize a matrix, each block with the range whose products differ least.

    Args:
        products: float32 `[K / block, block, block]`, channels of a block of the divided input times each other, summed over its rows.
        weight: float32 `[K, N]`, multiplied.

    Returns:
        int8 codes `[K, N]` in [-8, 7] and float32 scales `[K / block, N]`.
    """
    count, block, columns = len(products), products.shape[1], weight.shape[1]
    codes, scales = np.empty((count, block, columns), np.int8), np.empty((count, columns), np.float32)
    step = max(1, _SLAB // block)
    for number in range(count):
        part = slice(number * block, (number + 1) * block)
        for start in range(0, columns, step):
            piece = slice(start, start + step)
            codes[number, :, piece], scales[number, piece] = _best_range(products[number], weight[part, piece].astype(np.float32))
    return codes.reshape(weight.shape), scales


def _best_range(products: Array, weight: Array) -> tuple[Array, Array]:
    """Codes `[block, N]` and scales `[N]` of the least `δᵀ·products·δ`, δ being what a column's block loses."""
    peak = np.maximum(np.abs(weight).max(0), np.finfo(np.float32).smallest_normal)
    best_codes, best_scale, least = np.zeros(weight.shape, np.float32), peak, np.full(len(peak), np.inf, np.float32)
    for share in SHRINKS:
        scale = peak * np.float32(share / 7)
        codes = np.clip(np.rint(weight / scale), -8, 7)
        lost = codes * scale - weight
        loss = np.einsum("kn,kn->n", lost, products @ lost)
        better = loss < least
        best_codes, best_scale, least = (
            np.where(better, codes, best_codes),
            np.where(better, scale, best_scale),
            np.where(better, loss, least),
        )
    return best_codes.astype(np.int8), best_scale
