"""Engines of TensorRT and TensorRT-RTX: one per subgraph, one execution context per profile, all on one stream and one scratch memory.

The two packages share their Python interface; what differs is looked for, not assumed. The token table has no engine: its rows are looked
up on the CPU, where the sampler puts the next token anyway.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tmc_export.core.errors import BundleError, MissingExtraError, ResourceError
from tmc_export.core.lazy import require
from tmc_export.engine._types import TensorRT, as_tensorrt, or_none
from tmc_export.runtime._backend import BackendOptions, Graph
from tmc_export.runtime._cuda import Cuda
from tmc_export.runtime._device import DeviceRows, DeviceSlots
from tmc_export.runtime._engine_files import EngineFiles, EnginePlace
from tmc_export.runtime._engine_graph import EngineGraph, Shared
from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

if TYPE_CHECKING:
    import tensorrt

__all__ = ["TensorRTBackend"]

_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_EXTRAS = {"tensorrt": "jetson", "tensorrt-rtx": "rtx"}

_LOGS: dict[str, Log] = {}
"""Kept for good: TensorRT holds on to the first logger it was given and crashes when it is gone."""


class Log:
    """What TensorRT said went wrong.

    Attributes:
        logger: what TensorRT writes to.
    """

    def __init__(self, trt: TensorRT) -> None:
        if TYPE_CHECKING:
            from tensorrt import ILogger
        else:
            ILogger = trt.ILogger
        errors: list[str] = []

        class Logger(ILogger):
            def __init__(self) -> None:
                ILogger.__init__(self)

            def log(self, severity: tensorrt.ILogger.Severity, msg: str) -> None:
                if severity in (ILogger.ERROR, ILogger.INTERNAL_ERROR):
                    errors.append(" ".join(msg.split()))

        self._errors, self.logger = errors, Logger()

    def take(self) -> str:
        """The first errors since the last call, on one line."""
        said = " | ".join(self._errors[:3])
        self._errors.clear()
        return said or "it gives no reason"


class TensorRTBackend:
    """Opens the engines of a bundle.

    Args:
        folder: the bundle.
        options: see `BackendOptions`; `host` names the graphs that stay on the CPU.
        flavour: `tensorrt` or `tensorrt-rtx`.

    Attributes:
        name: the flavour.

    Raises:
        MissingExtraError: TensorRT or `cuda-bindings` is not installed.
        ResourceError: no driver, no GPU.
        BundleError: the bundle's engines are damaged.
    """

    def __init__(self, folder: Path, options: BackendOptions, flavour: str) -> None:
        self.name, self._options = flavour, options
        trt = _module(flavour)
        if flavour not in _LOGS:
            _LOGS[flavour] = Log(trt)
        self._log = _LOGS[flavour]
        cuda = Cuda(_EXTRAS[flavour])
        self._graphs: dict[str, Graph] = {}
        self._engines: dict[str, tensorrt.ICudaEngine] = {}
        self._rows: dict[str, DeviceRows] = {}
        self._shared = Shared(trt, cuda, self._log.take)
        self._runtime = [self._start(trt)]
        self._end = weakref.finalize(self._shared, _close, self._engines, self._runtime, cuda)  # graphs refer to it, and may live longer
        self._files = EngineFiles(folder, flavour, trt.__version__, cuda.capability)
        self._host = OnnxRuntimeBackend(folder, options)

    def close(self) -> None:
        """Give the device's memory back; otherwise done when neither the backend nor a graph is referred to any more."""
        self._graphs.clear()
        self._end()

    def graph(self, file: str) -> Graph:
        """Return the graph of a bundle file: a profile of an engine, or the token table on the CPU.

        Raises:
            BundleError: no engine for it, or TensorRT refuses the engine.
            ResourceError: not enough device memory.
        """
        if file in self._options.host:
            return self._host.graph(file)
        if file not in self._graphs:
            place = self._files.find(file)
            self._shared.cuda.enter()
            self._graphs[file] = EngineGraph(self._shared, self._engine(place), place.profile, file)
        return self._graphs[file]

    def slots(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> DeviceSlots:
        """Make slots on the device; see `Backend.slots`."""
        self._shared.cuda.enter()
        return DeviceSlots(self._shared.cuda, names, shape, dtype)

    def rows(self, name: str, most: int, axis: int) -> DeviceRows:
        """Return the rows of this name, made at the first call; see `Backend.rows`."""
        if name not in self._rows:
            self._rows[name] = DeviceRows(self._shared.cuda, name, most, axis)
        return self._rows[name]

    def _start(self, trt: TensorRT) -> tensorrt.Runtime:
        try:
            return trt.Runtime(self._log.logger)
        except (TypeError, RuntimeError) as error:  # pybind11 raises TypeError where the constructor gives nothing
            said = f"{self._log.take()} ({str(error).splitlines()[0]})"
            raise ResourceError(f"{self.name} {trt.__version__} does not start: {said}; see: tmc-export doctor") from error

    def _engine(self, place: EnginePlace) -> tensorrt.ICudaEngine:
        """Deserialize an engine once, straight from the mapped file."""
        if place.name not in self._engines:
            with place.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                engine = or_none(self._runtime[0].deserialize_cuda_engine(data))
                size = len(data)
            if engine is None:
                said = self._log.take()
                if "memory" in said.lower():
                    raise ResourceError(f"not enough device memory for the engine of {place.name} ({size} bytes): {said}")
                raise BundleError(f"TensorRT cannot load {place.path.name}: {said}; rebuild with: {self._files.again}")
            self._engines[place.name] = engine
            self._shared.need(max(engine.get_device_memory_size_for_profile_v2(n) for n in range(engine.num_optimization_profiles)))
        return self._engines[place.name]


def _module(flavour: str) -> TensorRT:
    """Import TensorRT."""
    module = _MODULES[flavour]
    try:
        return as_tensorrt(require(module, extra=_EXTRAS[flavour], purpose=f"run {flavour} engines"))
    except MissingExtraError as error:
        if flavour == "tensorrt":  # no extra brings it
            raise MissingExtraError(
                "cannot run tensorrt engines: the package 'tensorrt' is missing; JetPack brings it: sudo apt install nvidia-jetpack"
            ) from error
        raise


def _close(engines: dict[str, tensorrt.ICudaEngine], runtime: list[tensorrt.Runtime], cuda: Cuda) -> None:
    """Release what TensorRT holds, in the order it wants, then the memory that it worked on."""
    cuda.finish()
    engines.clear()
    runtime.clear()
    cuda.close()
