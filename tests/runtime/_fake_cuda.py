"""A CUDA driver made of numpy, with the names and results of `cuda.bindings.driver`, that finds what a real one would let pass.

Copies are not done when they are called but when somebody waits, as late as a device may do them. Every access must lie inside one living
allocation, a copy must not overlap itself, page-locked memory must not change between a call and its copy, and fresh memory holds NaN.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

GUARD = 4096
"""Bytes between two allocations that belong to nobody."""


class Fault(AssertionError):
    """Something that on a device is undefined: no exception of ours, so that nothing swallows it."""


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = CUresult.CUDA_SUCCESS


@dataclass
class Allocation:
    address: int
    data: np.ndarray
    freed: bool = False

    @property
    def size(self) -> int:
        return int(self.data.shape[0])


@dataclass(frozen=True)
class Work:
    """Something queued. `reads` and `writes` are (address, bytes) on the device, to be looked up again when it is done."""

    name: str
    run: Callable[[], None]
    reads: tuple[tuple[int, int], ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    host: tuple[int, int] | None = None  # page-locked memory that is read


@dataclass(frozen=True)
class Call:
    """One call of the driver or of TensorRT: its name, its arguments, and whether it was captured and not queued."""

    name: str
    arguments: tuple[Any, ...] = ()
    captured: bool = False


class CUDA_MEMCPY3D:
    """As the binding's: fields of zero, and no others."""

    _FIELDS = tuple(
        side + name
        for side in ("src", "dst")
        for name in ("XInBytes", "Y", "Z", "LOD", "MemoryType", "Host", "Device", "Array", "Pitch", "Height")
    )

    def __init__(self) -> None:
        for name in (*self._FIELDS, "WidthInBytes", "Height", "Depth"):
            object.__setattr__(self, name, 0)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dict__:
            raise AttributeError(f"CUDA_MEMCPY3D has no field {name}")
        object.__setattr__(self, name, value)


@dataclass
class FakeDriver:
    """The driver.

    Attributes:
        memory: bytes of the device.
        capability: (major, minor); None: there is no GPU.
        captures: whether streams may be captured.
        calls: every call, in order.
    """

    memory: int = 1 << 30
    capability: tuple[int, int] | None = (8, 9)
    captures: bool = True
    calls: list[Call] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    pinned: list[Allocation] = field(default_factory=list)
    capturing: list[Work] | None = None
    graphs: dict[int, list[Work]] = field(default_factory=dict)
    launched: list[tuple[int, list[Work]]] = field(default_factory=list)
    streams: set[int] = field(default_factory=set)
    context: int = 0

    CUresult = CUresult
    CUDA_MEMCPY3D = CUDA_MEMCPY3D
    CUdevice_attribute = SimpleNamespace(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_HOST=1, CU_MEMORYTYPE_DEVICE=2)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_GLOBAL=0, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __post_init__(self) -> None:
        self._next = 0x7F_0000_0000
        self._handles = itertools.count(1000)
        self._queue: list[tuple[Work, int | None]] = []

    # ---------------------------------------------------------------------------------------------------- start, end
    def cuInit(self, flags: int) -> tuple[CUresult]:
        self._say("cuInit", flags)
        return (OK if self.capability else CUresult.CUDA_ERROR_NO_DEVICE,)

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        self._say("cuDeviceGet", ordinal)
        return OK, 0

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[CUresult, int]:
        assert self.capability is not None
        return OK, self.capability[attribute - 75]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[CUresult, int]:
        self._say("cuDevicePrimaryCtxRetain", device)
        return OK, 7

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[CUresult]:
        self._say("cuDevicePrimaryCtxRelease", device)
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[CUresult]:
        self._say("cuCtxSetCurrent", context)
        self.context = context
        return (OK,)

    # -------------------------------------------------------------------------------------------------------- memory
    def cuMemAlloc(self, size: int) -> tuple[CUresult, int]:
        self._say("cuMemAlloc", size)
        if self.capturing is not None:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 0
        if size <= 0:
            return CUresult.CUDA_ERROR_INVALID_VALUE, 0
        if size > self.free:
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0
        made = Allocation(self._next, np.full(size, 0xFF, np.uint8))
        self._next += -(-(size + GUARD) // 512) * 512
        self.allocations.append(made)
        return OK, made.address

    def cuMemFree(self, address: int) -> tuple[CUresult]:
        self._say("cuMemFree", address)
        found = [a for a in self.allocations if a.address == address]
        if not found or found[0].freed:
            raise Fault(f"{address:#x} is freed twice, or was never allocated")
        if any(s < address + found[0].size and address < s + n for work, _ in self._queue for s, n in (*work.reads, *work.writes)):
            raise Fault(f"{address:#x} is freed while queued work uses it")
        found[0].freed = True
        return (OK,)

    @property
    def free(self) -> int:
        """Bytes of the device that nobody has."""
        return self.memory - sum(a.size for a in self.allocations if not a.freed)

    def cuMemGetInfo(self) -> tuple[CUresult, int, int]:
        return OK, self.free, self.memory

    def cuMemHostAlloc(self, size: int, flags: int) -> tuple[CUresult, int]:
        self._say("cuMemHostAlloc", size, flags)
        data = np.full(size, 0xFF, np.uint8)
        self.pinned.append(Allocation(data.ctypes.data, data))
        return OK, data.ctypes.data

    def cuMemFreeHost(self, address: int) -> tuple[CUresult]:
        self._say("cuMemFreeHost", address)
        next(a for a in self.pinned if a.address == address).freed = True
        return (OK,)

    def at(self, address: int, size: int) -> np.ndarray:
        """The bytes there: inside one living allocation, or a fault."""
        for a in self.allocations:
            if a.address <= address < a.address + a.size + GUARD:
                if a.freed:
                    raise Fault(f"{size} bytes at {address:#x}: that memory is freed")
                if address + size > a.address + a.size:
                    raise Fault(f"{size} bytes at {address:#x} leave their allocation of {a.size} bytes at {a.address:#x}")
                return a.data[address - a.address : address - a.address + size]
        raise Fault(f"{size} bytes at {address:#x}: nothing is allocated there")

    def _owner(self, place: tuple[int, int]) -> int:
        return max((a.address for a in self.allocations if a.address <= place[0]), default=0)

    def _locked(self, address: int, size: int) -> None:
        if not any(a.address <= address and address + size <= a.address + a.size and not a.freed for a in self.pinned):
            raise Fault(f"{size} bytes at {address:#x} of the host are not page-locked")

    # -------------------------------------------------------------------------------------------------------- copies
    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        self._locked(source, size)
        self.at(target, size)

        def run() -> None:
            self.at(target, size)[:] = np.frombuffer(ctypes.string_at(source, size), np.uint8)

        return self.push(Work("upload", run, (), ((target, size),), (source, size)), stream, target, source, size)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        self._locked(target, size)
        self.at(source, size)

        def run() -> None:
            ctypes.memmove(target, self.at(source, size).tobytes(), size)

        return self.push(Work("download", run, ((source, size),)), stream, target, source, size)

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[CUresult]:
        self.at(target, size)
        self.at(source, size)
        if abs(target - source) < size:
            raise Fault(f"a copy of {size} bytes from {source:#x} to {target:#x} overlaps itself")

        def run() -> None:
            self.at(target, size)[:] = self.at(source, size)

        return self.push(Work("copy", run, ((source, size),), ((target, size),)), stream, target, source, size)

    def cuMemsetD8Async(self, target: int, value: int, count: int, stream: int) -> tuple[CUresult]:
        self.at(target, count)

        def run() -> None:
            self.at(target, count)[:] = value

        return self.push(Work("clear", run, (), ((target, count),)), stream, target, value, count)

    def cuMemcpy3DAsync(self, given: CUDA_MEMCPY3D, stream: int) -> tuple[CUresult]:
        width, height, depth = given.WidthInBytes, given.Height, given.Depth
        if (given.srcMemoryType, given.dstMemoryType) != (2, 2) or min(width, height, depth) < 1:
            return (CUresult.CUDA_ERROR_INVALID_VALUE,)
        rows = {}
        for side in ("src", "dst"):
            pitch, lines = getattr(given, side + "Pitch"), getattr(given, side + "Height")
            if pitch < width or (depth > 1 and lines < height):
                return (CUresult.CUDA_ERROR_INVALID_VALUE,)
            base = getattr(given, side + "Device")
            rows[side] = [(base + z * lines * pitch + y * pitch, width) for z in range(depth) for y in range(height)]
        for side in rows.values():
            if len({self._owner(place) for place in side}) > 1:
                raise Fault("a copy walks from one allocation into another")
        for place in (*rows["src"], *rows["dst"]):
            self.at(*place)
        _expect_apart(rows["src"], rows["dst"], width)

        def run() -> None:
            for (source, _), (target, _) in zip(rows["src"], rows["dst"], strict=True):
                self.at(target, width)[:] = self.at(source, width)

        work = Work("copy", run, tuple(rows["src"]), tuple(rows["dst"]))
        return self.push(work, stream, rows["dst"][0][0], rows["src"][0][0], width, height, depth)

    # -------------------------------------------------------------------------------------------------------- stream
    def cuStreamCreate(self, flags: int) -> tuple[CUresult, int]:
        self._say("cuStreamCreate", flags)
        handle = next(self._handles)
        self.streams.add(handle)
        return OK, handle

    def cuStreamDestroy(self, stream: int) -> tuple[CUresult]:
        self._say("cuStreamDestroy", stream)
        self.streams.remove(stream)
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[CUresult]:
        self._say("cuStreamSynchronize", stream)
        if self.capturing is not None:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        queue, self._queue = self._queue, []
        for work, seen in queue:
            if work.host is not None and hash(ctypes.string_at(*work.host)) != seen:
                raise Fault(f"page-locked memory at {work.host[0]:#x} was written before {work.name} had read it")
            work.run()
        return (OK,)

    def push(self, work: Work, stream: int, *arguments: Any) -> tuple[CUresult]:
        """Queue something, or record it while the stream is captured."""
        if stream not in self.streams:
            raise Fault(f"{stream} is no stream")
        if self.context != 7:
            raise Fault("no context is current")
        self.calls.append(Call(work.name, arguments, self.capturing is not None))
        if self.capturing is not None:
            self.capturing.append(work)
        else:
            self._queue.append((work, None if work.host is None else hash(ctypes.string_at(*work.host))))
        return (OK,)

    # ------------------------------------------------------------------------------------------------------- capture
    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[CUresult]:
        self._say("cuStreamBeginCapture", stream, mode)
        if not self.captures:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        self.capturing = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[CUresult, int]:
        self._say("cuStreamEndCapture", stream)
        assert self.capturing is not None
        handle = next(self._handles)
        self.graphs[handle], self.capturing = self.capturing, None
        return OK, handle

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[CUresult, int]:
        self._say("cuGraphInstantiate", graph, flags)
        handle = next(self._handles)
        self.graphs[handle] = self.graphs[graph]
        return OK, handle

    def cuGraphDestroy(self, graph: int) -> tuple[CUresult]:
        self._say("cuGraphDestroy", graph)
        del self.graphs[graph]
        return (OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[CUresult]:
        self._say("cuGraphExecDestroy", graph)
        del self.graphs[graph]
        return (OK,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[CUresult]:
        self._say("cuGraphLaunch", graph)
        self.launched.append((graph, self.graphs[graph]))
        for work in self.graphs[graph]:
            self._queue.append((work, None if work.host is None else hash(ctypes.string_at(*work.host))))
        return (OK,)

    def _say(self, name: str, *arguments: Any) -> None:
        self.calls.append(Call(name, arguments))


def _expect_apart(source: list[tuple[int, int]], target: list[tuple[int, int]], width: int) -> None:
    """A copy reads and writes in any order: no byte may be on both sides, and none written twice."""
    reads, writes = (np.sort(np.array([a for a, _ in rows])) for rows in (source, target))
    if (np.diff(writes) < width).any():
        raise Fault("a copy writes a row twice")
    after = np.searchsorted(reads, writes)
    for shift in (-1, 0):
        near = reads[np.clip(after + shift, 0, len(reads) - 1)]
        if (np.abs(near - writes) < width).any():
            raise Fault("a copy overlaps itself")
