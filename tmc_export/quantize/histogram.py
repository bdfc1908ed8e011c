"""What is remembered of a linear's input while calibration runs: a histogram of magnitudes and the peaks of its channels.

Memory does not grow with the samples: bins are merged in pairs when a larger value comes, so that the result does not depend on the order
in which samples come.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BINS", "Histogram"]

BINS = 4096
"""Bins of a histogram; its upper end is a power of two, so that at least half of them lie below the largest value."""


class Histogram:
    """Magnitudes of a linear's input rows.

    Attributes:
        counts: int64 `[BINS]`, of magnitudes in `[i, i + 1) · top / BINS`; the last bin is closed.
        top: upper end of the bins, a power of two; 0 before anything but zeros came.
        peak: the largest magnitude.
        peaks: float32 `[K]`, the largest magnitude of every channel.
        means: float64 `[K]`, the mean magnitude of every channel.
        rows: rows seen.
    """

    def __init__(self, channels: int) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.top = 0.0
        self.peak = 0.0
        self.peaks = np.zeros(channels, np.float32)
        self._sums = np.zeros(channels, np.float64)
        self._zeros = 0
        self.rows = 0

    @property
    def means(self) -> Array:
        """Mean magnitude per channel; zeros before any row."""
        return self._sums / max(self.rows, 1)

    def add(self, rows: Array) -> None:
        """Take rows `[n, K]`.

        Raises:
            ValueError: a value is not finite.
        """
        if not len(rows):
            return
        size = np.abs(rows.astype(np.float32, copy=False))
        peaks = size.max(0)
        peak = float(peaks.max())
        if not math.isfinite(peak):
            raise ValueError(f"{int((~np.isfinite(size)).sum())} of {size.size} values are not finite")
        self.peaks = np.maximum(self.peaks, peaks)
        self._sums += size.sum(0, dtype=np.float64)
        self.rows += len(rows)
        if peak == 0.0 and self.top == 0.0:
            self._zeros += size.size
            return
        self._widen(peak)
        self.peak = max(self.peak, peak)
        self.counts += np.histogram(size, BINS, (0.0, self.top))[0]

    def _widen(self, peak: float) -> None:
        if self.top == 0.0:
            self.top = 2.0 ** math.ceil(math.log2(peak))
            self.counts[0] += self._zeros
        while self.top < peak:
            merged = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.concatenate([merged, np.zeros_like(merged)])
            self.top *= 2
