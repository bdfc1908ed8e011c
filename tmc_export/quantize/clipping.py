"""Where a quantizer's range ends: from a histogram of magnitudes to the one that the largest code stands for.

Symmetric, per tensor. `levels` is the largest code: 127 of int8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tmc_export.quantize.histogram import BINS, Histogram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Observer", "clip_of", "entropy", "mse", "percentile"]

Observer = Literal["minmax", "percentile", "entropy", "mse"]
_STEP = 16
"""Bins between two ends that are tried."""


def clip_of(observer: Observer, seen: Histogram, *, share: float = 99.99, levels: int = 127) -> float:
    """Return the end of the range; 0 where only zeros were seen.

    Args:
        observer: how it is chosen.
        seen: the magnitudes.
        share: per cent of the magnitudes that `percentile` keeps inside.
        levels: the largest code.
    """
    if seen.top == 0.0:
        return 0.0
    choose: dict[Observer, Callable[[], float]] = {
        "minmax": lambda: seen.peak,
        "percentile": lambda: percentile(seen, share),
        "entropy": lambda: entropy(seen, levels),
        "mse": lambda: mse(seen, levels),
    }
    return min(choose[observer](), seen.peak)


def percentile(seen: Histogram, share: float) -> float:
    """The upper edge of the first bin up to which at least `share` per cent of all magnitudes lie."""
    total = np.cumsum(seen.counts)
    return float(np.searchsorted(total, total[-1] * share / 100) + 1) * seen.top / BINS


def mse(seen: Histogram, levels: int) -> float:
    """The end with the least squared error of rounding and clipping, every magnitude taken at its bin's middle."""
    middles, used = (np.arange(BINS) + 0.5) * seen.top / BINS, np.flatnonzero(seen.counts)
    values, weights = middles[used], seen.counts[used].astype(np.float64)
    ends = _ends(seen)
    errors = []
    for end in ends:
        step = end / levels
        rounded = np.minimum(np.rint(values / step), levels) * step
        errors.append(float((weights * (values - rounded) ** 2).sum()))
    return float(ends[int(np.argmin(errors))])


def entropy(seen: Histogram, levels: int) -> float:
    """The end whose quantized distribution loses the least information (KL divergence).

    Source: "8-bit Inference with TensorRT", S. Migacz, GTC 2017: what is clipped counts in the last bin; the bins inside are shared out
    over as many levels as the codes have, and each level over those of its bins that were seen.
    """
    counts = seen.counts.astype(np.float64)
    ends = np.unique(np.rint(_ends(seen) / seen.top * BINS).astype(int))
    ends = ends[ends > levels]
    if not len(ends):
        return seen.peak
    losses = [_divergence(counts, int(end), levels + 1) for end in ends]
    return float(ends[int(np.argmin(losses))]) * seen.top / BINS


def _divergence(counts: Array, end: int, levels: int) -> float:
    inside = counts[:end]
    wanted = inside.copy()
    wanted[-1] += counts[end:].sum()
    level = np.arange(end) * levels // end
    live = inside > 0
    total = np.bincount(level, inside, levels)
    members = np.bincount(level, live, levels)
    shared = np.where(live, total[level] / np.maximum(members[level], 1), 0.0)
    p, q = wanted / wanted.sum(), shared / max(shared.sum(), 1.0)
    both = (p > 0) & (q > 0)
    lost = float(p[(p > 0) & (q == 0)].sum())  # what is clipped into a bin that nothing was in has no counterpart
    return float((p[both] * np.log(p[both] / q[both])).sum()) + lost * 50.0


def _ends(seen: Histogram) -> Array:
    last = max(int(np.flatnonzero(seen.counts)[-1]) + 1, 1)
    bins = np.unique(np.concatenate([np.arange(_STEP, last, _STEP), [last]]))
    ends: Array = np.minimum(bins * seen.top / BINS, seen.peak) if last > 0 else bins.astype(float)
    return np.unique(ends[ends > 0])
