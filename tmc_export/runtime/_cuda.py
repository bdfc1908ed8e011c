"""The CUDA driver through NVIDIA's `cuda-bindings`: memory, copies on one stream, and captured graphs of work. No torch, no CUDA runtime.

Everything is queued on one stream, in order: what a later call reads, an earlier one has written. Only `synchronize` waits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import BundleError, ResourceError
from tmc_export.core.lazy import require

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

__all__ = ["Copy", "Cuda", "Pinned"]


@dataclass(frozen=True)
class Copy:
    """A copy inside the device: `depth` slices of `height` rows of `width` bytes.

    Attributes:
        source, target: addresses of the first byte.
        source_pitch, target_pitch: bytes from row to row.
        source_slice, target_slice: bytes from slice to slice, whole numbers of pitches; not read where `depth` is 1.
    """

    source: int
    target: int
    width: int
    height: int = 1
    depth: int = 1
    source_pitch: int = 0
    target_pitch: int = 0
    source_slice: int = 0
    target_slice: int = 0


@dataclass(frozen=True)
class Pinned:
    """Page-locked memory of the host: its address, and the same bytes as an array."""

    address: int
    bytes: Bytes


class Cuda:
    """The first GPU: its primary context, which TensorRT uses as well, and a stream.

    Args:
        extra: of tmc-export, that brings `cuda-bindings`.

    Attributes:
        capability: `"SM89"`.
        stream: handle of the stream, as TensorRT takes it.

    Raises:
        MissingExtraError: no `cuda-bindings`.
        ResourceError: no driver, no GPU.
    """

    def __init__(self, extra: str) -> None:
        self._driver: Any = require("cuda.bindings.driver", extra=extra, purpose="run TensorRT engines")
        try:
            self._call("cuInit", 0)
            self._device = self._call("cuDeviceGet", 0)
        except (BundleError, RuntimeError) as error:  # the bindings raise RuntimeErrors of their own where libcuda.so.1 is missing
            raise ResourceError(f"no GPU to run engines on: {error}; use --backend onnxruntime, or a machine with a GPU") from error
        kinds = self._driver.CUdevice_attribute
        major, minor = (
            self._call("cuDeviceGetAttribute", getattr(kinds, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), self._device)
            for part in ("MAJOR", "MINOR")
        )
        self.capability = f"SM{major}{minor}"
        self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
        self._thread = 0
        self.enter()
        self._stream = self._call("cuStreamCreate", int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self.stream = int(self._stream)
        self._memory: set[int] = set()
        self._pinned: list[Pinned] = []
        self._queued = self._done = 0

    # ------------------------------------------------------------------------------------------------------- memory
    def allocate(self, size: int, what: str) -> int:
        """Return the address of `size` bytes on the device, at least 1, aligned to 256.

        Raises:
            ResourceError: not enough; says how many bytes were asked for `what`, and how many were free.
        """
        address = self._new("cuMemAlloc", size, what)
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        """Give memory back; what is queued must not read it any more."""
        self._memory.remove(address)
        self._call("cuMemFree", address)

    def pin(self, size: int, what: str) -> Pinned:
        """Return `size` page-locked bytes of the host, which copies read and write without a buffer between; zeros.

        Raises:
            ResourceError: as `allocate`.
        """
        address = self._new("cuMemHostAlloc", size, what, 0)
        found = Pinned(address, np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)))
        found.bytes[:] = 0
        self._pinned.append(found)
        return found

    def _new(self, function: str, size: int, what: str, *more: int) -> int:
        result = getattr(self._driver, function)(size, *more)
        if result[0] == self._driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            free, total = self._call("cuMemGetInfo")
            raise ResourceError(
                f"not enough device memory for {what}: {size} bytes asked, {free} of {total} free; "
                "close other programs on the GPU, or build smaller inputs, more compression or int4 weights"
            )
        self._check(function, result)
        return int(result[1])

    # ------------------------------------------------------------------------------------------------------- copies
    def upload(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes from page-locked memory; they must stay as they are until `synchronize`."""
        self._queue("cuMemcpyHtoDAsync", target, source, size)

    def download(self, target: int, source: int, size: int) -> None:
        """Queue a copy of `size` bytes to page-locked memory; they are there after `synchronize`."""
        self._queue("cuMemcpyDtoHAsync", target, source, size)

    def clear(self, target: int, size: int) -> None:
        """Queue the writing of zeros."""
        self._queue("cuMemsetD8Async", target, 0, size)

    def copy(self, copy: Copy) -> None:
        """Queue a copy inside the device. Plain `cuMemcpy2D` may refuse pitches that are not the driver's own; `cuMemcpy3D` takes any."""
        if copy.height == copy.depth == 1:
            self._queue("cuMemcpyDtoDAsync", copy.target, copy.source, copy.width)
            return
        made = self._driver.CUDA_MEMCPY3D()
        made.srcMemoryType = made.dstMemoryType = self._driver.CUmemorytype.CU_MEMORYTYPE_DEVICE
        made.srcDevice, made.dstDevice = copy.source, copy.target
        made.srcPitch, made.dstPitch = copy.source_pitch, copy.target_pitch
        if copy.depth > 1:
            made.srcHeight, made.dstHeight = copy.source_slice // copy.source_pitch, copy.target_slice // copy.target_pitch
        made.WidthInBytes, made.Height, made.Depth = copy.width, copy.height, copy.depth
        self._queue("cuMemcpy3DAsync", made)

    # ------------------------------------------------------------------------------------------------------- stream
    @property
    def queued(self) -> int:
        """Calls that were queued so far; see `wait`."""
        return self._queued

    def note(self) -> None:
        """Something else, such as TensorRT, queued work on the stream."""
        self._queued += 1

    def synchronize(self) -> None:
        """Wait for all that is queued.

        Raises:
            BundleError: some of it failed.
        """
        self._call("cuStreamSynchronize", self._stream)
        self._done = self._queued

    def wait(self, mark: int) -> None:
        """Wait for what was queued up to an earlier `queued`; nothing where that is known to be done."""
        if mark > self._done:
            self.synchronize()

    def enter(self) -> None:
        """Make the context this thread's; sessions may be used from any one thread at a time."""
        if self._thread != (now := threading.get_ident()):
            self._call("cuCtxSetCurrent", self._context)
            self._thread = now

    def capture(self, work: Callable[[], None]) -> Any:
        """Record what `work` queues instead of doing it, and return it as an executable graph for `launch`.

        Raises:
            BundleError: the driver, or `work`, refuses; nothing was done, and the stream is as before.
        """
        queued = self._queued
        self._call("cuStreamBeginCapture", self._stream, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            ended = self._driver.cuStreamEndCapture(self._stream)  # its own error says no more than this one
            if ended[0] == self._driver.CUresult.CUDA_SUCCESS:
                self._driver.cuGraphDestroy(ended[1])
            raise
        finally:
            self._queued = queued
        graph = self._call("cuStreamEndCapture", self._stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def launch(self, captured: Any) -> None:
        """Queue a captured graph."""
        self._queue("cuGraphLaunch", captured)

    def forget(self, captured: Any) -> None:
        """Destroy a captured graph."""
        self._call("cuGraphExecDestroy", captured)

    def finish(self) -> None:
        """Wait for all that is queued, whether or not it succeeds."""
        self.enter()
        self._driver.cuStreamSynchronize(self._stream)

    def close(self) -> None:
        """Give everything back; the object is of no use afterwards."""
        self.finish()
        for address in self._memory:
            self._driver.cuMemFree(address)
        for pinned in self._pinned:
            self._driver.cuMemFreeHost(pinned.address)
        self._memory.clear()
        self._pinned.clear()
        self._driver.cuStreamDestroy(self._stream)
        self._driver.cuDevicePrimaryCtxRelease(self._device)

    # -------------------------------------------------------------------------------------------------------- calls
    def _queue(self, function: str, *arguments: Any) -> None:
        self._queued += 1
        self._check(function, getattr(self._driver, function)(*arguments, self._stream))

    def _call(self, function: str, *arguments: Any) -> Any:
        """Call the driver; returns what comes behind the error code: nothing, one value, or several."""
        result = getattr(self._driver, function)(*arguments)
        self._check(function, result)
        return result[1] if len(result) == 2 else result[1:]

    def _check(self, function: str, result: tuple[Any, ...]) -> None:
        if result[0] != self._driver.CUresult.CUDA_SUCCESS:
            raise BundleError(f"CUDA refuses {function}: {_name(result[0])}; see: tmc-export doctor")


def _name(code: Any) -> str:
    return str(getattr(code, "name", code))
