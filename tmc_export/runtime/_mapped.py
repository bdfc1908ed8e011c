"""Weights that all sessions of a bundle read in place, where its files are mapped.

onnxruntime maps a weight file once per session: the pages are one another's, but each session's count in the process's resident memory
again. Handed over as initializers (`SessionOptions.add_initializer`), they are mapped once.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import BundleError
from tmc_export.engine._proto import external_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MappedWeights", "SharedWeights"]

_FLOAT32 = 1
"""ONNX's number of the type; what else there is, onnxruntime's CPU path turns into something of its own."""
_SMALL = 1 << 20


@dataclass(frozen=True)
class SharedWeights:
    """The weights of one graph.

    Attributes:
        values: initializer → its value in the mapped file.
        others: bytes of weights of other types, which a session holds itself; 0 when they are below a MiB.
    """

    values: dict[str, ort.OrtValue]
    others: int


class MappedWeights:
    """Maps each weight file of a bundle once, read-only, at the first graph that names it."""

    def __init__(self) -> None:
        self._files: dict[Path, NDArray[Any]] = {}

    def of(self, graph: Path) -> SharedWeights:
        """Return the weights of a graph.

        Raises:
            BundleError: the graph or a weight file is missing or cut short, or a weight file lies outside of the graph's folder.
        """
        values: dict[str, ort.OrtValue] = {}
        others = 0
        for tensor in external_tensors(graph):
            if tensor.type != _FLOAT32 or tensor.offset % 4:
                others += tensor.length
                continue
            data = self._map(path_in(graph.parent, tensor.location, f"the graph {graph.name}"))
            end = tensor.offset + 4 * prod(tensor.dims)
            if end > data.shape[0]:
                raise BundleError(f"{graph.parent / tensor.location} ends before the weight '{tensor.name}' does; copy the bundle again")
            array = data[tensor.offset : end].view(np.float32).reshape(tensor.dims)
            value = ort.OrtValue.ortvalue_from_numpy(array)
            if value.data_ptr() == array.ctypes.data:  # else it was copied: the session reads the file itself
                values[tensor.name] = value
        return SharedWeights(values, others if others >= _SMALL else 0)

    def _map(self, path: Path) -> NDArray[Any]:
        if path not in self._files:
            try:
                self._files[path] = np.memmap(path, np.uint8, "r")
            except (OSError, ValueError) as error:
                raise BundleError(f"cannot read the weight file {path}: {error}; copy the bundle again") from error
        return self._files[path]
