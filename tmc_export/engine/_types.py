"""TensorRT's module as a type: what this project calls, with the classes of `tensorrt-stubs` (10.13), for `tensorrt` and `tensorrt_rtx`.

Type checkers see the stubs (`tools/tensorrt_stubs.py` installs them); at run time nothing is imported. What the stubs lack or TensorRT-RTX
adds is here as a protocol of its own, and a row of `_versions.DIFFERENCES`.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

if TYPE_CHECKING:
    import tensorrt

__all__ = ["RtxBuilderConfig", "RtxModule", "RtxRuntimeConfig", "TensorRT", "as_tensorrt", "or_none", "sizes"]

T = TypeVar("T")


class _Names(Protocol):
    """The names of `tensorrt` and `tensorrt_rtx` that are used; `tensorrt.INetworkDefinition` and others are only ever returned."""

    @property
    def Builder(self) -> type[tensorrt.Builder]:
        """Makes networks, configurations, profiles and engines."""

    @property
    def DataType(self) -> type[tensorrt.DataType]:
        """Types of tensors."""

    @property
    def Dims(self) -> type[tensorrt.Dims]:
        """A shape."""

    @property
    def ExecutionContextAllocationStrategy(self) -> type[tensorrt.ExecutionContextAllocationStrategy]:
        """Whose memory a context works in."""

    @property
    def ILogger(self) -> type[tensorrt.ILogger]:
        """Base of loggers, with the severities."""

    @property
    def IProgressMonitor(self) -> type[tensorrt.IProgressMonitor]:
        """Base of what is told of phases."""

    @property
    def IStreamWriter(self) -> type[tensorrt.IStreamWriter]:
        """Base of what an engine is written to."""

    @property
    def MemoryPoolType(self) -> type[tensorrt.MemoryPoolType]:
        """Kinds of memory that a limit is for."""

    @property
    def NetworkDefinitionCreationFlag(self) -> type[tensorrt.NetworkDefinitionCreationFlag]:
        """Flags of networks."""

    @property
    def OnnxParser(self) -> type[tensorrt.OnnxParser]:
        """Reads ONNX files."""

    @property
    def ProfilingVerbosity(self) -> type[tensorrt.ProfilingVerbosity]:
        """How much is said of layers."""

    @property
    def Runtime(self) -> type[tensorrt.Runtime]:
        """Loads engines."""

    @property
    def TensorIOMode(self) -> type[tensorrt.TensorIOMode]:
        """Input or output."""

    @property
    def TensorLocation(self) -> type[tensorrt.TensorLocation]:
        """Host or device."""

    def nptype(self, trt_type: tensorrt.DataType) -> Any:
        """Return numpy's type for TensorRT's."""


class TensorRT(_Names, Protocol):
    """TensorRT's module; mypy does not look for a module's `__version__` when it compares one with a protocol."""

    __version__: str


class RtxModule(Protocol):
    """What the module `tensorrt_rtx` has besides: an enumeration whose members are looked for by name."""

    ComputeCapability: object


class RtxBuilderConfig(Protocol):
    """What TensorRT-RTX's configuration of a build has besides."""

    num_compute_capabilities: int

    def set_compute_capability(self, compute_capability: object, index: int) -> bool:
        """Name one of the GPUs that the engine is for; False when it is refused."""


class RtxRuntimeConfig(Protocol):
    """What TensorRT-RTX's configuration of a context has besides."""

    dynamic_shapes_kernel_specialization_strategy: Any


def as_tensorrt(module: ModuleType) -> TensorRT:
    """Take an imported module for TensorRT; the one place where nothing is checked."""
    return cast("TensorRT", module)


def or_none(value: T) -> T | None:
    """Return a value as what may be None: pybind11 gives None where TensorRT fails, and the stubs do not say so."""
    return value


def sizes(dims: tensorrt.Dims) -> tuple[int, ...]:
    """Return a shape as numbers; -1 is a size that is open."""
    return tuple(dims[axis] for axis in range(len(dims)))


if TYPE_CHECKING:
    _MODULE: _Names = tensorrt  # the stubs have every name of the protocol, with its type
