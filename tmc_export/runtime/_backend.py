"""What executes graphs: one interface, one implementation per runtime, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tmc_export.bundle.program import Program
from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.registry import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BACKENDS", "Backend", "BackendOptions", "Graph", "open_backend", "options_for"]


class Graph(Protocol):
    """A loaded static graph."""

    inputs: tuple[str, ...]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; names that the graph does not have are ignored, a missing one is an error.

        Returns:
            Every output by name; a graph that fills slots returns the row it wrote, `present.*`, as the others do.
        """
        ...

    def step(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run for one token.

        Args:
            feed: as for `run`; arrays that are the same ones as at the call before are read again, and cost nothing to hand over.

        Returns:
            As `run`, in arrays that the next step overwrites. A graph that can writes its new rows into the feed's own
            `past_key_values.*`; `present.*` then is missing.
        """
        ...


class Backend(Protocol):
    """Opens graphs of one bundle."""

    name: str

    def graph(self, file: str) -> Graph:
        """Return the graph of a bundle file, loading it at the first call."""
        ...


@dataclass(frozen=True)
class BackendOptions:
    """How graphs are executed.

    Attributes:
        threads: threads inside an operator; None: the runtime's choice.
        int4_accuracy: how onnxruntime multiplies int4 weights. 4: activations are rounded to int8 for each product, which is fast; 1: they
            stay float, which is what a device computes.
        memory_tight: keep one copy of the weights, mapped from the file, instead of a packed copy per phase; slower.
        spin: files of graphs whose threads wait for the next run awake. Faster where one graph follows itself, as decode steps of a single
            block do; a graph that others follow would take the cores from them for a while.

    Raises:
        RuntimeInputError: another accuracy, or no thread.
    """

    threads: int | None = None
    int4_accuracy: int = 4
    memory_tight: bool = False
    spin: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.int4_accuracy not in (1, 4):
            raise RuntimeInputError(f"int4_accuracy is {self.int4_accuracy}; use 4 (fast) or 1 (what a device computes)")
        if self.threads is not None and self.threads < 1:
            raise RuntimeInputError(f"threads is {self.threads}; give 1 or more")


def options_for(program: Program, threads: int | None = None, int4_accuracy: int = 4) -> BackendOptions:
    """Return the options that suit a bundle.

    Raises:
        RuntimeInputError: as `BackendOptions`.
    """
    alone = program.blocks[0].phases["decode"].file if len(program.blocks) == 1 else None
    return BackendOptions(threads, int4_accuracy, program.memory_tight, frozenset() if alone is None else frozenset({alone}))


def _onnxruntime(folder: Path, options: BackendOptions) -> Backend:
    from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, options)


BACKENDS: dict[str, Callable[[Path, BackendOptions], Backend]] = {"onnxruntime": _onnxruntime}

_NOT_BUILT = ("tensorrt", "tensorrt-rtx")


def open_backend(name: str, folder: Path, options: BackendOptions) -> Backend:
    """Return the backend of that name for a bundle.

    Raises:
        RuntimeInputError: it does not exist, or is not built yet.
    """
    if name in _NOT_BUILT:
        raise RuntimeInputError(
            f"backend '{name}': running engines is not built yet; use --backend onnxruntime (engines are built, not run)"
        )
    if name not in BACKENDS:
        known = [*BACKENDS, *_NOT_BUILT]
        raise RuntimeInputError(f"unknown backend '{name}'{nearest(name, known)}; choose one of: {', '.join(known)}")
    return BACKENDS[name](folder, options)
