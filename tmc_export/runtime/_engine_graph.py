"""One profile of an engine as a graph: its context, its inputs and outputs at fixed addresses, and its step as a captured CUDA graph.

Integers and flags come from the host: they lie behind one another, on both sides, and go over in one copy. Floating point inputs, and
8-bit codes, which only slots are (int8, and fp8 as bytes), are bound where they lie on the device (slots, outputs of the graph before),
copied from rows on the device, or uploaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.engine._types import RtxRuntimeConfig, TensorRT, or_none, sizes
from tmc_export.runtime._backend import Held, Outputs
from tmc_export.runtime._cuda import Cuda, Pinned
from tmc_export.runtime._device import DevicePiece, DeviceTensor, aligned, stride_of

if TYPE_CHECKING:
    import tensorrt
    from numpy.typing import NDArray

    Array = NDArray[Any]
    Upload = tuple[int, int, int]

__all__ = ["EngineGraph", "Shared"]

_CODES = (np.dtype(np.int8), np.dtype(np.uint8))
_NEW = "present."
"""Outputs of this prefix are new rows of keys and values; they lie as the slots do, so that one copy appends them."""


@dataclass
class Shared:
    """What the graphs of one backend have in common.

    Attributes:
        trt: TensorRT's module.
        cuda: the device.
        errors: what TensorRT said went wrong, since the last call.
        scratch: memory that every context works in, one after the other on the one stream; 0: none yet.
        scratch_bytes: its size.
        capture: whether steps are captured; off once that failed.
    """

    trt: TensorRT
    cuda: Cuda
    errors: Callable[[], str]
    scratch: int = 0
    scratch_bytes: int = 0
    capture: bool = True

    def need(self, size: int) -> None:
        """Make the scratch memory at least so large."""
        if self.scratch and size <= self.scratch_bytes:
            return
        if self.scratch:
            self.cuda.synchronize()
            self.cuda.free(self.scratch)
            self.scratch = self.scratch_bytes = 0
        size = aligned(size)
        self.scratch, self.scratch_bytes = self.cuda.allocate(size, "TensorRT's activations"), size

    def refuse_capture(self, file: str, why: str) -> None:
        """Give up capturing, for all graphs, and say so."""
        self.capture = False
        warnings.warn(f"{file}: decode steps are not replayed as a CUDA graph ({why}); each is queued anew", RuntimeWarning, stacklevel=2)


@dataclass
class _Inputs:
    """Integers and flags, behind one another."""

    base: int = 0
    size: int = 0
    mirror: Pinned | None = None
    views: dict[str, Array] = field(default_factory=dict)


class EngineGraph:
    """A graph of the bundle.

    Args:
        shared: see `Shared`.
        engine: deserialized.
        profile: number of the profile.
        file: the graph's file, for messages.

    Attributes:
        inputs: names.

    Raises:
        BundleError: TensorRT refuses the profile, or a tensor does not lie on the device.
        ResourceError: not enough device memory.
    """

    def __init__(self, shared: Shared, engine: tensorrt.ICudaEngine, profile: int, file: str) -> None:
        self._shared, self._cuda, self._engine, self._file = shared, shared.cuda, engine, file
        self._context = self._make_context()
        if not self._context.set_optimization_profile_async(profile, self._cuda.stream):
            raise self._failed(f"refuses profile {profile}")
        self._cuda.note()
        names = [engine.get_tensor_name(n) for n in range(engine.num_io_tensors)]
        given = [n for n in names if engine.get_tensor_mode(n) == shared.trt.TensorIOMode.INPUT]
        self.inputs = tuple(given)
        self._shapes = {n: self._input_shape(n, profile) for n in given}
        try:
            missing = self._context.infer_shapes()
        except RuntimeError as error:
            raise self._failed("infers no shapes") from error
        if missing:
            raise BundleError(f"{file}: TensorRT wants values of {', '.join(missing)} for its shapes; build the bundle again")
        self._shapes |= {n: sizes(self._context.get_tensor_shape(n)) for n in names if n not in self._shapes}
        self._dtypes = {n: _numpy_type(shared.trt, engine.get_tensor_dtype(n)) for n in names}
        for name in names:
            self._expect_static(name)
        self._bound: dict[str, int] = {}
        self._known: dict[str, Held] = {}  # tensors of the device that are bound: the slots, token after token
        self._bindings = 0  # how often an address changed
        self._own: dict[str, DeviceTensor] = {}
        self._staged: dict[str, tuple[Pinned, Array]] = {}
        self._fetched: dict[str, tuple[Pinned, Array]] = {}
        self._inputs = self._lay_inputs()
        self._outputs = self._lay_outputs([n for n in names if n not in given])
        self._memory = 0
        self._sent = 0  # mark of the last call that reads this graph's page-locked memory
        self._warm: object = None
        self._captured: tuple[object, Any] | None = None

    # -------------------------------------------------------------------------------------------------------- layout
    def _make_context(self) -> tensorrt.IExecutionContext:
        """A context without memory of its own. TensorRT-RTX compiles kernels for the shapes when they are first run, not behind our back
        after it, so that a captured step has them."""
        trt = self._shared.trt
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        eager = getattr(trt, "DynamicShapesKernelSpecializationStrategy", None)
        if eager is None:
            context = or_none(self._engine.create_execution_context(strategy))
        else:
            config = self._engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            cast("RtxRuntimeConfig", config).dynamic_shapes_kernel_specialization_strategy = eager.EAGER
            context = or_none(self._engine.create_execution_context(runtime_config=config))
        if context is None:
            raise self._failed("makes no execution context")
        return context

    def _input_shape(self, name: str, profile: int) -> tuple[int, ...]:
        shape = sizes(self._engine.get_tensor_shape(name))
        if min(shape, default=0) >= 0:
            return shape
        found = sizes(self._engine.get_tensor_profile_shape(name, profile)[1])
        if not self._context.set_input_shape(name, found):
            raise self._failed(f"refuses {name} {list(found)}")
        return found

    def _expect_static(self, name: str) -> None:
        if min(self._shapes[name], default=0) < 0 or self._engine.get_tensor_location(name) != self._shared.trt.TensorLocation.DEVICE:
            raise BundleError(f"{self._file}: the shape or place of {name} is open {list(self._shapes[name])}; build the engines again")

    def _bytes(self, name: str) -> int:
        size: int = math.prod(self._shapes[name]) * self._dtypes[name].itemsize
        return size

    def _lay_inputs(self) -> _Inputs:
        """Put integers and flags behind one another; those without elements (the empty past of a prefill) get a place that nobody reads."""
        names = [n for n in self.inputs if self._dtypes[n].kind != "f" and self._dtypes[n] not in _CODES and self._bytes(n)]
        empty = [n for n in self.inputs if not self._bytes(n)]
        made, size = _Inputs(), sum(aligned(self._bytes(n)) for n in names)
        made.base = self._cuda.allocate(size + aligned(0), f"inputs of {self._file}")
        for name in empty:
            self._bind(name, made.base + size)
        if not names:
            return made
        made.size, made.mirror = size, self._cuda.pin(size, f"inputs of {self._file}")
        at = 0
        for name in names:
            made.views[name] = self._view(made.mirror, at, name)
            self._own[name] = DeviceTensor(made.base + at, self._shapes[name], self._dtypes[name])
            at += aligned(self._bytes(name))
        return made

    def _lay_outputs(self, names: list[str]) -> dict[str, DeviceTensor]:
        """Give every output its address: new keys and values layer behind layer, the others behind them."""
        new = sorted((n for n in names if n.startswith(_NEW)), key=lambda n: (int(n.split(".")[1]), n))
        sizes = {n: stride_of(self._shapes[n], self._dtypes[n].itemsize) for n in new}
        sizes |= {n: aligned(self._bytes(n)) for n in names if n not in sizes}
        at = self._cuda.allocate(sum(sizes.values()), f"outputs of {self._file}")
        made = {}
        for name, size in sizes.items():
            made[name] = DeviceTensor(at, self._shapes[name], self._dtypes[name], size if name in new else 0)
            self._bind(name, at)
            at += size
        return made

    def _view(self, pinned: Pinned, at: int, name: str) -> Array:
        view: Array = pinned.bytes[at : at + self._bytes(name)].view(self._dtypes[name]).reshape(self._shapes[name])
        return view

    # ----------------------------------------------------------------------------------------------------------- run
    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run once and fetch every output; see `Graph.run`.

        Raises:
            BundleError: an input of another shape or type than the engine's, or TensorRT fails.
        """
        return dict(self.relay(feed, tuple(self._outputs)).arrays)

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run once; outputs stay on the device but for those to fetch, which are copies. See `Graph.relay` and `run`."""
        self._cuda.enter()
        self._run(self._feed(feed, pad=False), fetch)
        self._sent = self._cuda.queued
        if fetch:
            self._cuda.synchronize()
        return Outputs({name: self._fetched[name][1].copy() for name in fetch}, self._outputs)

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run for one token: the second time the work is captured, and from then on launched as one; see `Graph.step` and `run`."""
        self._cuda.enter()
        uploads = self._feed(feed, pad=True)
        key = (tuple(uploads), tuple(fetch), self._bindings, self._shared.scratch)
        if self._captured is not None and self._captured[0] == key:
            self._cuda.launch(self._captured[1])
        elif self._warm == key and self._capture(key, uploads, fetch):
            pass
        else:  # TensorRT settles what depends on addresses at the first run with them, which cannot be captured
            self._run(uploads, fetch)
            self._warm = key
        self._sent = self._cuda.queued
        if fetch:
            self._cuda.synchronize()
        return Outputs({name: self._fetched[name][1] for name in fetch}, self._outputs)

    def _capture(self, key: object, uploads: list[Upload], fetch: Collection[str]) -> bool:
        """Capture the step and launch it; False where that does not work, and nothing was done."""
        if not self._shared.capture:
            return False
        if self._captured is not None:
            self._cuda.forget(self._captured[1])
            self._captured = None
        may = getattr(self._context, "is_stream_capturable", None)
        try:
            if may is not None and not may(self._cuda.stream):
                raise BundleError("TensorRT says that it cannot be captured")
            captured = self._cuda.capture(lambda: self._run(uploads, fetch))
        except BundleError as error:
            self._shared.refuse_capture(self._file, str(error))
            return False
        self._captured = key, captured
        self._cuda.launch(captured)
        return True

    def _run(self, uploads: list[Upload], fetch: Collection[str]) -> None:
        """Queue the uploads, the engine and the downloads."""
        for upload in uploads:
            self._cuda.upload(*upload)
        if self._memory != self._shared.scratch:
            self._context.set_device_memory(self._shared.scratch, self._shared.scratch_bytes)
            self._memory = self._shared.scratch
        if not self._context.execute_async_v3(self._cuda.stream):
            raise self._failed("does not run")
        self._cuda.note()
        for name in fetch:
            if name not in self._outputs:
                raise BundleError(f"{self._file} has no output {name}; build the engines again")
            if name not in self._fetched:
                pinned = self._cuda.pin(max(self._bytes(name), 1), f"{name} of {self._file}")
                self._fetched[name] = pinned, self._view(pinned, 0, name)
            self._cuda.download(self._fetched[name][0].address, self._outputs[name].address, self._bytes(name))

    # ---------------------------------------------------------------------------------------------------------- feed
    def _feed(self, feed: Mapping[str, Held], pad: bool) -> list[Upload]:
        """Bind and copy what lies on the device, write what does not to page-locked memory; returns what is to be uploaded."""
        self._cuda.wait(self._sent)
        uploads: list[Upload] = []
        small = False
        for name in self.inputs:
            if not self._bytes(name):
                continue
            value = feed[name]
            if value is self._known.get(name):
                continue
            self._expect(name, value, pad)
            if isinstance(value, DeviceTensor):
                self._bind(name, value.address)
                self._known[name] = value
                continue
            self._known.pop(name, None)
            own = self._place(name)
            self._bind(name, own.address)
            if isinstance(value, DevicePiece):
                value.copy_to(self._cuda, own)
            elif name in self._inputs.views:
                _write(self._inputs.views[name], np.asarray(value))
                small = True
            else:
                pinned, view = self._stage(name)
                _write(view, np.asarray(value))
                uploads.append((own.address, pinned.address, own.nbytes))
        if small and self._inputs.mirror is not None:
            uploads.insert(0, (self._inputs.base, self._inputs.mirror.address, self._inputs.size))
        return uploads

    def _expect(self, name: str, value: Held, pad: bool) -> None:
        """Refuse another type or shape; an array of a step may be shorter, then zeros fill it up."""
        want, got = self._shapes[name], tuple(value.shape)
        shorter = pad and isinstance(value, np.ndarray) and len(got) == len(want) and all(g <= w for g, w in zip(got, want, strict=True))
        if value.dtype != self._dtypes[name] or (got != want and not shorter):
            raise BundleError(
                f"{self._file} takes {name} {list(want)} of {self._dtypes[name]}, not {list(got)} of {value.dtype}; rebuild the engines"
            )

    def _place(self, name: str) -> DeviceTensor:
        """The input's own memory, made when it is first needed: inputs that are always bound elsewhere have none."""
        if name not in self._own:
            address = self._cuda.allocate(aligned(self._bytes(name)), f"{name} of {self._file}")
            self._own[name] = DeviceTensor(address, self._shapes[name], self._dtypes[name])
        return self._own[name]

    def _stage(self, name: str) -> tuple[Pinned, Array]:
        if name not in self._staged:
            pinned = self._cuda.pin(self._bytes(name), f"{name} of {self._file}")
            self._staged[name] = pinned, self._view(pinned, 0, name)
        return self._staged[name]

    def _bind(self, name: str, address: int) -> None:
        if self._bound.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            raise self._failed(f"refuses the address of {name}")
        self._bound[name] = address
        self._bindings += 1

    def _failed(self, what: str) -> BundleError:
        return BundleError(
            f"TensorRT {self._shared.trt.__version__} {what} in {self._file}: {self._shared.errors()}; see: tmc-export doctor"
        )


def _numpy_type(trt: TensorRT, given: tensorrt.DataType) -> np.dtype[Any]:
    """Numpy's type; of fp8, which it lacks, bytes."""
    return np.dtype(np.uint8 if given == trt.DataType.FP8 else trt.nptype(given))


def _write(view: Array, array: Array) -> None:
    """Write an array into the front of a view, and zeros behind it."""
    if array.shape != view.shape:
        view[:] = 0
    view[tuple(slice(size) for size in array.shape)] = array
