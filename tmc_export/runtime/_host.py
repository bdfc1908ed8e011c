"""Rows and slots in the host's memory: what onnxruntime's graphs hand on, as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.runtime._backend import Held

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["HostMemory", "HostRows", "HostSlots"]


class HostRows:
    """Rows of arrays.

    Args:
        axis: where they are counted.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._parts: list[Array] = []

    @classmethod
    def of(cls, array: Array, axis: int) -> HostRows:
        """All rows of an array."""
        rows = cls(axis)
        rows._parts = [array]
        return rows

    def put(self, source: Held, at: int, count: int) -> None:
        """Take the first `count` rows of an array; it is not copied, and must stay as it is."""
        self._parts.append(self._cut(np.asarray(source), 0, count))

    def piece(self, start: int, stop: int, size: int) -> Array:
        """The rows `[start, stop)`, zeros behind them up to `size`; contiguous."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts, self._axis)]
        found = self._cut(self._parts[0], start, stop)
        if stop - start == size:
            return np.ascontiguousarray(found)
        shape = list(found.shape)
        shape[self._axis] = size - (stop - start)
        return np.concatenate([found, np.zeros(shape, found.dtype)], self._axis)

    def _cut(self, array: Array, start: int, stop: int) -> Array:
        return array[(slice(None),) * self._axis + (slice(start, stop),)]


class HostSlots:
    """Keys and values as arrays `[1, g, C, d]`, filled in place.

    Attributes:
        tensors: by the name of the block's input.
    """

    tensors: Mapping[str, Held]

    def __init__(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> None:
        self._buffers: dict[str, Array] = {name: np.zeros(shape, dtype) for name in names}
        self.tensors = self._buffers

    def append(self, present: Mapping[str, Held], start: int, count: int) -> None:
        """Write the first `count` new rows into the slots from `start` on.

        Raises:
            BundleError: rows are of another type than the slots.
        """
        for name, buffer in self._buffers.items():
            rows = np.asarray(present[name.replace("past_key_values.", "present.", 1)])
            if rows.dtype != buffer.dtype:
                raise BundleError(f"new rows of {rows.dtype} do not fit slots of {buffer.dtype}; build the bundle again")
            buffer[:, :, start : start + count] = rows[:, :, :count]

    def move(self, start: int, chosen: Array) -> None:
        """Bring the rows of the slots `chosen` to the slots from `start` on."""
        for buffer in self._buffers.values():
            buffer[:, :, start : start + chosen.shape[0]] = buffer[:, :, chosen]


class HostMemory:
    """The part of a backend that gives memory, for backends whose graphs take and return arrays."""

    def slots(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> HostSlots:
        """Make slots; see `Backend.slots`."""
        return HostSlots(names, shape, dtype)

    def rows(self, name: str, most: int, axis: int) -> HostRows:
        """Make rows; see `Backend.rows`."""
        return HostRows(axis)
