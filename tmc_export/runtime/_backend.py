"""What executes graphs and keeps what passes between them: one interface, one implementation per runtime, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tmc_export.bundle.program import Program
from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.registry import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = [
    "BACKENDS", "PROVIDERS", "Backend", "BackendOptions", "Graph", "Held", "Outputs", "Rows", "SlotStore", "open_backend", "options_for",
]  # fmt: skip


class Held(Protocol):
    """A tensor where its graph left it: a numpy array, or memory of the device. Graphs, rows and slots of the same backend read it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> Any:
        """Numpy's dtype."""
        ...


@dataclass(frozen=True)
class Outputs:
    """What a run gave.

    Attributes:
        arrays: what was to be fetched, in the host's memory.
        held: the other outputs, and maybe these too, where they are; they last until their graph runs again.
    """

    arrays: Mapping[str, Array]
    held: Mapping[str, Held]


class Graph(Protocol):
    """A loaded static graph."""

    inputs: tuple[str, ...]

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run once; names that the graph does not have are ignored, a missing one is an error.

        Returns:
            Every output by name; a graph that fills slots returns the row it wrote, `present.*`, as the others do.
        """
        ...

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run as `run` does, and bring to the host only the outputs that `fetch` names."""
        ...

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run for one token.

        Args:
            feed: as for `run`; arrays that are the same ones as at the call before are read again, and cost nothing to hand over. Where
                the graph takes more tokens at once, the rows behind the one are padding.
            fetch: outputs to bring to the host, the same ones at every call.

        Returns:
            As `relay`, in arrays that the next step overwrites. A graph that can writes its new rows into the feed's own
            `past_key_values.*`; `present.*` then is missing.
        """
        ...


class Rows(Protocol):
    """What a block or cut hands on, put together from its runs: rows along one axis."""

    def put(self, source: Held, at: int, count: int) -> None:
        """Take the first `count` rows of an output as the rows from `at` on; rows are put in order."""
        ...

    def piece(self, start: int, stop: int, size: int) -> Held:
        """The rows `[start, stop)` as an input of `size` rows, zeros behind them."""
        ...


class SlotStore(Protocol):
    """Where the keys and values of a block lie, `[1, g, C, d]` each.

    Attributes:
        tensors: by the name of the block's input, the same ones for good.
    """

    tensors: Mapping[str, Held]

    def append(self, present: Mapping[str, Held], start: int, count: int) -> None:
        """Write the first `count` new rows `present.*` `[1, g, T, d]` into the slots from `start` on."""
        ...

    def move(self, start: int, chosen: Array) -> None:
        """Bring the rows of the slots `chosen`, int `[n]`, ascending and none before its new place, to the slots from `start` on."""
        ...


class Backend(Protocol):
    """Opens graphs of one bundle, and gives memory for what they hand on."""

    name: str

    def graph(self, file: str) -> Graph:
        """Return the graph of a bundle file, loading it at the first call."""
        ...

    def slots(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> SlotStore:
        """Make slots of zeros for inputs of these names, of one shape `[1, g, C, d]`."""
        ...

    def rows(self, name: str, most: int, axis: int) -> Rows:
        """Return empty rows.

        Args:
            name: whose output it is; rows of one name replace each other.
            most: rows there will ever be under this name.
            axis: where the outputs count rows.
        """
        ...


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
"""Our names of onnxruntime's execution providers."""


@dataclass(frozen=True)
class BackendOptions:
    """How graphs are executed.

    Attributes:
        threads: threads inside an operator; None: the runtime's choice.
        int4_accuracy: how onnxruntime multiplies int4 and int8 weights. 4: activations are rounded to int8 for each product, which is
            fast; 1: they stay float, which is what a device computes.
        memory_tight: keep one copy of the weights instead of a packed one per phase; slower. Floating-point weights stay in the file, which
            is mapped once for all sessions, and each run turns float16 into float32, one weight at a time; of graphs with codes, those of
            one phase are loaded at a time. int8 codes get a scale per 128 of them instead of per 32, and so do activations at accuracy 4.
            Nothing is kept between runs. With glibc, freed blocks of `_malloc.LARGE` and more leave the process.
        phases: files of graphs of the decoder and the token table → their phase.
        spin: files of graphs whose threads wait for the next run awake. Faster where one graph follows itself, as decode steps of a single
            block do; a graph that others follow would take the cores from them for a while.
        host: files of graphs that run on the CPU with every backend: the token table.
        provider: what onnxruntime executes graphs with: `cpu`, `cuda` or `tensorrt`.

    Raises:
        RuntimeInputError: another accuracy or provider, or no thread.
    """

    threads: int | None = None
    int4_accuracy: int = 4
    memory_tight: bool = False
    spin: frozenset[str] = frozenset()
    host: frozenset[str] = frozenset()
    provider: str = "cpu"
    phases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.int4_accuracy not in (1, 4):
            raise RuntimeInputError(f"int4_accuracy is {self.int4_accuracy}; use 4 (fast) or 1 (what a device computes)")
        if self.threads is not None and self.threads < 1:
            raise RuntimeInputError(f"threads is {self.threads}; give 1 or more")
        if self.provider not in PROVIDERS:
            raise RuntimeInputError(f"unknown provider '{self.provider}'{nearest(self.provider, PROVIDERS)}; {_one_of(PROVIDERS)}")


def options_for(program: Program, threads: int | None = None, int4_accuracy: int = 4, provider: str = "cpu") -> BackendOptions:
    """Return the options that suit a bundle.

    Raises:
        RuntimeInputError: as `BackendOptions`.
    """
    alone = program.blocks[0].phases["decode"].file if len(program.blocks) == 1 else None
    spin = frozenset() if alone is None else frozenset({alone})
    host = frozenset(phase.file for phase in program.embed.values())
    phases = {phase.file: name for part in (program.embed, *(b.phases for b in program.blocks)) for name, phase in part.items()}
    return BackendOptions(threads, int4_accuracy, program.memory_tight, spin, host, provider, phases)


def _one_of(names: Collection[str]) -> str:
    return f"choose one of: {', '.join(names)}"


def _onnxruntime(folder: Path, options: BackendOptions) -> Backend:
    from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, options)


def _tensorrt(folder: Path, options: BackendOptions) -> Backend:
    from tmc_export.runtime._tensorrt import TensorRTBackend

    return TensorRTBackend(folder, options, "tensorrt")


def _tensorrt_rtx(folder: Path, options: BackendOptions) -> Backend:
    from tmc_export.runtime._tensorrt import TensorRTBackend

    return TensorRTBackend(folder, options, "tensorrt-rtx")


BACKENDS: dict[str, Callable[[Path, BackendOptions], Backend]] = {
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "tensorrt-rtx": _tensorrt_rtx,
}


def open_backend(name: str, folder: Path, options: BackendOptions) -> Backend:
    """Return the backend of that name for a bundle.

    Raises:
        RuntimeInputError: it does not exist, or does not go with the options.
        MissingExtraError: its packages are not installed.
        BundleError: the bundle has no engines for it, or engines of another TensorRT or GPU.
        ResourceError: no GPU, or not enough memory.
    """
    if name not in BACKENDS:
        raise RuntimeInputError(f"unknown backend '{name}'{nearest(name, BACKENDS)}; {_one_of(BACKENDS)}")
    if name != "onnxruntime" and options.provider != "cpu":
        raise RuntimeInputError(f"provider '{options.provider}' is onnxruntime's, the backend is '{name}'; leave the provider out")
    return BACKENDS[name](folder, options)
