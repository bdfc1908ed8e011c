"""GPTQ: int4 codes chosen one input channel after the other, each error made good by the channels that come.

Frantar et al. 2023, arXiv 2210.17323, algorithm 1. Official code: IST-DASLab/gptq, `gptq.py` (`fasterquant`), with `groupsize` = block, in
the order of the channels, 1 % damping. Scales of a block are found when it begins, on the weights as they are then; as everywhere here the
best of three (`int4.py`), where the official code takes the range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.quantize.int4 import quantize_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["DAMPING", "gptq_blocks"]

DAMPING = 0.01
"""Share of the mean of the diagonal that is added to it; the official code's number."""


def gptq_blocks(weight: Array, products: Array, block: int) -> tuple[Array, Array]:
    """Quantize a matrix on what it multiplies.

    Args:
        weight: float `[K, N]`, K a multiple of `block`.
        products: `[K, K]`, the input's channels times each other, summed over its rows: `XᵀX`.
        block: input channels that share a scale.

    Returns:
        int8 `[K, N]` in [-8, 7], and scales `[K / block, N]` of the weight's dtype, as `int4.quantize_blocks`.
    """
    rest, channels = weight.astype(np.float32), weight.shape[0]
    codes = np.empty(rest.shape, np.int8)
    scales = np.empty((channels // block, rest.shape[1]), weight.dtype)
    upper = _inverse_root(products)
    for start in range(0, channels, block):
        end = start + block
        part, errors = rest[start:end], np.empty((block, rest.shape[1]), np.float32)
        _, found = quantize_blocks(part.astype(weight.dtype), block)
        scales[start // block] = found[0]
        wide = found[0].astype(np.float32)
        for i in range(block):
            codes[start + i] = np.clip(np.rint(part[i] / wide), -8, 7)
            errors[i] = (part[i] - codes[start + i] * wide) / upper[start + i, start + i]
            part[i + 1 :] -= upper[start + i, start + i + 1 : end, None] * errors[i]
        rest[end:] -= upper[start:end, end:].T @ errors
    return codes, scales


def _inverse_root(products: Array) -> Array:
    """The upper Cholesky factor of the damped inverse; channels that were always 0 count as independent."""
    damped = products.astype(np.float64)
    silent = np.flatnonzero(np.diag(damped) == 0)
    damped[silent, silent] = 1.0
    damped[np.diag_indices_from(damped)] += DAMPING * float(np.mean(np.diag(damped)))
    inverse = np.linalg.inv(damped)
    root: Array = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float32)
    return root
