"""What executes graphs: one interface, one implementation per runtime, chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tmc_export.core.errors import RuntimeInputError
from tmc_export.core.registry import nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["BACKENDS", "Backend", "Graph", "open_backend"]


class Graph(Protocol):
    """A loaded static graph."""

    inputs: tuple[str, ...]

    def run(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; names that the graph does not have are ignored, a missing one is an error. Returns every output by name."""
        ...


class Backend(Protocol):
    """Opens graphs of one bundle."""

    name: str

    def graph(self, file: str) -> Graph:
        """Return the graph of a bundle file, loading it at the first call."""
        ...


def _onnxruntime(folder: Path, threads: int | None, int4_accuracy: int) -> Backend:
    from tmc_export.runtime._onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(folder, threads, int4_accuracy)


BACKENDS: dict[str, Callable[[Path, int | None, int], Backend]] = {"onnxruntime": _onnxruntime}

_NOT_BUILT = ("tensorrt", "tensorrt-rtx")


def open_backend(name: str, folder: Path, threads: int | None = None, int4_accuracy: int = 4) -> Backend:
    """Return the backend of that name for a bundle; `int4_accuracy` is 4 (fast) or 1 (what a device computes).

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
    return BACKENDS[name](folder, threads, int4_accuracy)
