"""SmoothQuant: part of the activations' range is moved into the weights, channel by channel.

Xiao et al. 2023, arXiv 2211.10438, equation 4: `d_j = max|X_j|^α / max|W_j|^(1-α)`. Official code: mit-han-lab/smoothquant,
`smoothquant/smooth.py`, which divides behind norms only; here every input of a quantized product is divided (`_divide.py` says at what
cost).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["smooth_divisors"]

_LEAST = 1e-5
"""Smaller peaks count as this; the official code's number."""


def smooth_divisors(peaks: Array, weights: Sequence[Array], alpha: float) -> Array:
    """Return what an input's channels are divided by.

    Args:
        peaks: float32 `[K]`, the largest magnitude of each channel.
        weights: `[out, K]` of every linear that reads it.
        alpha: 0 leaves the activations alone but for the weights' range, 1 moves all of their range.

    Returns:
        float32 `[K]`, above 0; 1 where a channel was always 0.

    >>> smooth_divisors(np.array([4.0, 0.0]), [np.array([[1.0, 2.0], [-1.0, 0.5]])], 0.5).tolist()
    [2.0, 1.0]
    """
    wide = np.maximum(np.stack([np.abs(w).max(0) for w in weights]).max(0).astype(np.float64), _LEAST)
    found = np.maximum(peaks.astype(np.float64) ** alpha / wide ** (1 - alpha), _LEAST)
    return np.where(peaks > 0, found, 1.0).astype(np.float32)
