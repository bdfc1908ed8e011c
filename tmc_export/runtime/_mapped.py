"""Weights that all sessions of a bundle read in place, where its files are mapped.

onnxruntime maps a weight file once per session: the pages are one another's, but each session's count in the process's resident memory
again. Handed over as initializers (`SessionOptions.add_initializer`), they are mapped once.

Constants it turns into something else at load: float32 is packed for its products, float16 is turned into float32 for good. That stops
when the graph names them as inputs with a default value: then float32 is multiplied as it lies in the file, and float16 is turned into
float32 by each run, one weight at a time. Codes and their scales must stay constants: else onnxruntime widens them in every run (measured:
40 times the time of a token in int4).
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from tmc_export.bundle.read import path_in
from tmc_export.core.errors import BundleError
from tmc_export.engine._proto import ExternalTensor, external_tensors, gathered_table, read_by, with_graph_inputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["MappedWeights", "SharedWeights"]

_FLOAT32, _FLOAT16 = 1, 10
"""ONNX's numbers of the types that are read in place; codes onnxruntime's CPU path packs in a form of its own."""
_TYPES: Mapping[int, Any] = {_FLOAT32: np.float32, _FLOAT16: np.float16}
_SMALL = 1 << 20
_NO_CONSTANT = 1 << 16
"""Bytes from which a weight stops being a constant: norms and biases stay, which onnxruntime fuses by their values."""


@dataclass(frozen=True)
class SharedWeights:
    """The weights of one graph.

    Attributes:
        values: initializer → its value in the mapped file.
        others: bytes of weights of other types, which a session holds itself; 0 when they are below a MiB.
        model: the graph with the large ones of `values` as inputs that have a default; None: as it is in its file, all weights being
            float32.
        widens: some of those inputs are float16, so that each run turns them into float32.
        codes: some weights are codes.
    """

    values: Mapping[str, ort.OrtValue]
    others: int
    model: bytes | None = None
    widens: bool = False
    codes: bool = False


def _bytes(tensor: ExternalTensor) -> int:
    """Bytes of a tensor of one of `_TYPES`, by its shape."""
    return int(np.dtype(_TYPES[tensor.type]).itemsize * prod(tensor.dims))


class MappedWeights:
    """Maps each weight file of a bundle once, read-only, at the first graph that names it."""

    def __init__(self) -> None:
        self._files: dict[Path, tuple[mmap.mmap, NDArray[Any]]] = {}
        self._whole: set[Path] = set()
        self._read: dict[Path, frozenset[Path]] = {}

    def of(self, graph: Path, rows: bool = False) -> SharedWeights:
        """Return the weights of a graph.

        Args:
            graph: its file.
            rows: it reads few rows of them in a run; see `give_back`.

        Raises:
            BundleError: the graph or a weight file is missing or cut short, or a weight file lies outside of the graph's folder.
        """
        tensors = external_tensors(graph)
        plain = all(tensor.type == _FLOAT32 for tensor in tensors)
        model = graph.read_bytes()
        packed = frozenset[str]() if plain else read_by(model, ("DequantizeLinear", "QuantizeLinear"))
        values: dict[str, ort.OrtValue] = {}
        inputs: list[ExternalTensor] = []
        others = 0
        for tensor in tensors:
            small = tensor.length < _NO_CONSTANT
            if tensor.type not in _TYPES or tensor.name in packed or tensor.offset % np.dtype(_TYPES[tensor.type]).itemsize:
                others += tensor.length
            elif (tensor.type == _FLOAT32 or not small) and (value := self._value(graph, tensor, rows)) is not None:
                values[tensor.name] = value
                if not small:
                    inputs.append(tensor)
        widens = any(tensor.type == _FLOAT16 for tensor in inputs)
        return SharedWeights(
            values, others if others >= _SMALL else 0, None if plain else with_graph_inputs(model, inputs), widens, bool(packed)
        )

    def table(self, graph: Path) -> NDArray[Any] | None:
        """Return the table `[n, c]` whose rows a graph does nothing but read, where its file is mapped.

        None where it does something else, its rows are no floats, or the graph contradicts itself: onnxruntime says what of it is wrong.

        Raises:
            BundleError: as `of`.
        """
        found = gathered_table(graph)
        if found is None or found.type not in _TYPES or found.length not in (0, _bytes(found)):
            return None
        return self._array(graph, found)

    def give_back(self, graph: Path) -> None:
        """Take the pages of a graph that reads few rows out of the process; the next run finds its rows in the system's cache or the file.

        A page that is read brings its neighbours with it: 640 rows of a table of 115 MB left 55 MB of it in the process. Files that
        another graph reads as a whole stay.
        """
        if graph not in self._read:
            told = f"the graph {graph.name}"
            self._read[graph] = frozenset(path_in(graph.parent, tensor.location, told) for tensor in external_tensors(graph))
        for path in self._read[graph]:
            if path in self._files and path not in self._whole and hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
                self._files[path][0].madvise(mmap.MADV_DONTNEED)

    def leave(self) -> None:
        """Take the pages of all files out of the process: what the next runs read comes back from the system's cache or the file."""
        for mapped, _ in self._files.values():
            if hasattr(mmap, "MADV_DONTNEED"):  # Windows has none
                mapped.madvise(mmap.MADV_DONTNEED)

    def _value(self, graph: Path, tensor: ExternalTensor, rows: bool) -> ort.OrtValue | None:
        """The weight where it is mapped; None when onnxruntime copies it: then the session reads the file itself."""
        array = self._array(graph, tensor)
        if not rows:
            self._whole.add(path_in(graph.parent, tensor.location, f"the graph {graph.name}"))
        value = ort.OrtValue.ortvalue_from_numpy(array)
        return value if value.data_ptr() == array.ctypes.data else None

    def _array(self, graph: Path, tensor: ExternalTensor) -> NDArray[Any]:
        """The weight in the mapped file."""
        data = self._map(path_in(graph.parent, tensor.location, f"the graph {graph.name}"))
        end = tensor.offset + _bytes(tensor)
        if end > data.shape[0]:
            raise BundleError(f"{graph.parent / tensor.location} ends before the weight '{tensor.name}' does; copy the bundle again")
        array: NDArray[Any] = data[tensor.offset : end].view(_TYPES[tensor.type]).reshape(tensor.dims)
        return array

    def _map(self, path: Path) -> NDArray[Any]:
        if path not in self._files:
            try:
                with path.open("rb") as file:
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise BundleError(f"cannot read the weight file {path}: {error}; copy the bundle again") from error
            self._files[path] = mapped, np.frombuffer(mapped, np.uint8)
        return self._files[path][1]
