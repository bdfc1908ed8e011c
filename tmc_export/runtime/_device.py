"""Tensors, rows and slots in the device's memory, and the copies between them.

Legend: b batch (1), g KV heads, C slots, T new tokens, d channels of a head, L layers of a block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.runtime._backend import Held
from tmc_export.runtime._cuda import Copy, Cuda

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["ALIGNMENT", "DevicePiece", "DeviceRows", "DeviceSlots", "DeviceTensor", "aligned", "stride_of"]

ALIGNMENT = 256
"""Bytes: what TensorRT asks of a tensor's address (`setTensorAddress`), and what the driver's allocations have."""

_SPARE = 64
"""Rows that are moved at once where their old and new places overlap."""


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor on the device.

    Attributes:
        address: of its first byte.
        shape, dtype: as numpy's.
        stride: bytes to the next tensor of the stack that it is in, all in one allocation; 0: it is in none.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stride: int = 0

    @property
    def nbytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class DevicePiece:
    """Rows `[start, stop)` of a tensor along an axis, to be copied into an input of `size` rows, zeros behind them."""

    tensor: DeviceTensor
    axis: int
    start: int
    stop: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the input."""
        return (*self.tensor.shape[: self.axis], self.size, *self.tensor.shape[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the tensor."""
        return self.tensor.dtype

    def copy_to(self, cuda: Cuda, target: DeviceTensor) -> None:
        """Queue the copy into an input of this shape."""
        if self.stop - self.start < self.size:
            cuda.clear(target.address, target.nbytes)
        _copy_rows(cuda, self.tensor, target, self.axis, self.start, 0, self.stop - self.start)


def aligned(size: int) -> int:
    """Round up to the alignment, at least one.

    >>> aligned(0), aligned(256), aligned(257)
    (256, 256, 512)
    """
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


def stride_of(shape: Sequence[int], itemsize: int) -> int:
    """Bytes from one tensor `[1, g, T, d]` to the next of a stack that one copy can walk: whole heads, and aligned.

    >>> stride_of((1, 2, 5, 8), 4)  # a head has 160 bytes, so that the eighth is the first to be aligned again
    1280
    """
    head = shape[2] * shape[3] * itemsize
    step = math.lcm(head, ALIGNMENT)
    return -(-shape[1] * head // step) * step


def _copy_rows(cuda: Cuda, source: DeviceTensor, target: DeviceTensor, axis: int, start: int, at: int, count: int) -> None:
    """Queue a copy of `count` rows along an axis, from `start` in the source to `at` in the target; the other axes are equal."""
    row = math.prod(source.shape[axis + 1 :]) * source.dtype.itemsize
    cuda.copy(
        Copy(
            source.address + start * row, target.address + at * row, count * row, height=math.prod(source.shape[:axis]),
            source_pitch=source.shape[axis] * row, target_pitch=target.shape[axis] * row,
        )
    )  # fmt: skip


class DeviceRows:
    """Rows of outputs, in memory of their own; see `Rows`.

    Args:
        cuda: the device.
        name: whose rows they are, for messages.
        most: rows at most.
        axis: where they are counted.
    """

    def __init__(self, cuda: Cuda, name: str, most: int, axis: int) -> None:
        self._cuda, self._name, self._most, self._axis = cuda, name, most, axis
        self._tensor: DeviceTensor | None = None

    def put(self, source: Held, at: int, count: int) -> None:
        """Queue a copy of the first `count` rows."""
        given = on_device(source, self._name)
        if self._tensor is None:
            shape = (*given.shape[: self._axis], self._most, *given.shape[self._axis + 1 :])
            size = math.prod(shape) * given.dtype.itemsize
            self._tensor = DeviceTensor(self._cuda.allocate(aligned(size), self._name), shape, given.dtype)
        if at + count > self._most:
            raise BundleError(f"{self._name} takes {self._most} rows, {at + count} were made; build the bundle again")
        _copy_rows(self._cuda, given, self._tensor, self._axis, 0, at, count)

    def piece(self, start: int, stop: int, size: int) -> DevicePiece:
        """The rows `[start, stop)`, to be copied by the graph that reads them."""
        if self._tensor is None:
            raise BundleError(f"{self._name} was not made by the graph before; build the bundle again")
        return DevicePiece(self._tensor, self._axis, start, stop, size)


def on_device(given: Held, name: str) -> DeviceTensor:
    """Return what must be a tensor of the device.

    Raises:
        BundleError: it is an array.
    """
    if not isinstance(given, DeviceTensor):
        raise BundleError(f"{name} does not lie on the device; its graph has no engine: build the engines again")
    return given


class DeviceSlots:
    """Keys and values of a block in one piece of memory, tensor behind tensor, so that one copy appends to all layers and heads.

    Args:
        cuda: the device.
        names: inputs of the block's graphs.
        shape: `(1, g, C, d)`.
        dtype: numpy's name.

    Attributes:
        tensors: by name.

    Raises:
        ResourceError: not enough device memory.
    """

    tensors: Mapping[str, Held]

    def __init__(self, cuda: Cuda, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> None:
        self._cuda, self._names, self._shape, self._dtype = cuda, tuple(names), shape, np.dtype(dtype)
        self._row = shape[3] * self._dtype.itemsize
        self._stride = stride_of(shape, self._dtype.itemsize)
        what = f"the KV slots of {len(names)} tensors {list(shape)}"
        self._base = cuda.allocate(self._stride * len(names), what)
        cuda.clear(self._base, self._stride * len(names))
        places = {name: self._base + n * self._stride for n, name in enumerate(names)}
        self.tensors = {name: DeviceTensor(place, shape, self._dtype) for name, place in places.items()}
        self._spare: tuple[int, int] | None = None  # address, stride

    def append(self, present: Mapping[str, Held], start: int, count: int) -> None:
        """Queue the copy of the first `count` new rows of all layers and heads into the slots from `start` on: one copy where the block's
        graph laid its new rows out as the slots are."""
        given = [on_device(present[name.replace("past_key_values.", "present.", 1)], name) for name in self._names]
        first, tokens = given[0], given[0].shape[2]
        if any(t.shape != (*self._shape[:2], tokens, self._shape[3]) or t.dtype != self._dtype for t in given):
            raise BundleError(
                f"new rows {list(first.shape)} of {first.dtype} do not fit slots {list(self._shape)}; build the engines again"
            )
        if count > tokens or start + count > self._shape[2]:
            raise BundleError(f"{count} rows of {tokens} do not fit {self._shape[2]} slots from {start} on; build the engines again")
        stride = first.stride
        if stride and [t.address for t in given] == [first.address + n * stride for n in range(len(given))]:
            self._copy(first.address, tokens, stride, self._base + start * self._row, count)
            return
        for tensor, name in zip(given, self._names, strict=True):
            _copy_rows(self._cuda, tensor, on_device(self.tensors[name], name), 2, 0, start, count)

    def move(self, start: int, chosen: Array) -> None:
        """Queue the moves, run by run; where a run's old and new place overlap, through spare memory."""
        ends = np.flatnonzero(np.diff(chosen) != 1) + 1
        for first, last in zip([0, *ends], [*ends, len(chosen)], strict=True):
            if last > first and int(chosen[first]) != start + first:
                self._shift(int(chosen[first]), start + int(first), int(last - first))

    def _shift(self, source: int, target: int, count: int) -> None:
        gap = source - target
        while count:
            part = min(count, max(gap, _SPARE))
            at, to = self._base + source * self._row, self._base + target * self._row
            if part <= gap:
                self._copy(at, self._shape[2], self._stride, to, part)
            else:
                spare, stride = self._spare_rows()
                self._copy(at, self._shape[2], self._stride, spare, part, _SPARE, stride)
                self._copy(spare, _SPARE, stride, to, part)
            source, target, count = source + part, target + part, count - part

    def _spare_rows(self) -> tuple[int, int]:
        if self._spare is None:
            stride = stride_of((1, self._shape[1], _SPARE, self._shape[3]), self._dtype.itemsize)
            self._spare = self._cuda.allocate(stride * len(self._names), "spare KV slots"), stride
        return self._spare

    def _copy(
        self, source: int, source_rows: int, source_slice: int, target: int, count: int, target_rows: int = 0, target_slice: int = 0
    ) -> None:
        """Queue a copy of `count` rows of every head of every tensor; the target is the slots unless it says otherwise."""
        self._cuda.copy(
            Copy(
                source, target, count * self._row, height=self._shape[1], depth=len(self._names),
                source_pitch=source_rows * self._row, target_pitch=(target_rows or self._shape[2]) * self._row,
                source_slice=source_slice, target_slice=target_slice or self._stride,
            )
        )  # fmt: skip
