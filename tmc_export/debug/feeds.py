"""What every subgraph of a bundle is fed with while conversations are played: the inputs that a fault is looked for with."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import Program
from tmc_export.core.errors import BundleError
from tmc_export.runtime._backend import Backend, Graph, Held, Outputs, Rows, SlotStore

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Capture", "running_order"]

_KEPT = 3
"""Feeds kept of a subgraph, each from another conversation or place of one."""


def running_order(program: Program) -> tuple[str, ...]:
    """Return the files of a bundle's graphs in the order in which they run."""
    files = [t.file for t in program.towers] + [v.file for v in program.vision] + [e.file for e in program.embed.values()]
    for block in program.blocks:
        cut = program.cut_before(block.index)
        files += ([] if cut is None else [cut.file]) + [phase.file for phase in block.phases.values()]
    return tuple(dict.fromkeys(files))


class Capture:
    """A backend that hands on to another one and keeps what it was fed with.

    Args:
        backend: runs the graphs.

    Attributes:
        feeds: file → up to three feeds.
        failed: the first graph that could not be run, with its feed and what the backend said; None when all ran.
    """

    def __init__(self, backend: Backend) -> None:
        self.name, self._backend = backend.name, backend
        self.feeds: dict[str, list[dict[str, Array]]] = {}
        self.failed: tuple[str, dict[str, Array], str] | None = None

    def graph(self, file: str) -> Graph:
        """Return a graph whose feeds are kept."""
        return _Tapped(self, self._backend.graph(file), file)

    def slots(self, names: Sequence[str], shape: tuple[int, ...], dtype: str) -> SlotStore:
        """The other backend's slots."""
        return self._backend.slots(names, shape, dtype)

    def rows(self, name: str, most: int, axis: int) -> Rows:
        """The other backend's rows."""
        return self._backend.rows(name, most, axis)

    def keep(self, file: str, inputs: tuple[str, ...], feed: Mapping[str, Held]) -> None:
        """Keep a copy of a feed while there is room: slots are filled in place later."""
        kept = self.feeds.setdefault(file, [])
        if len(kept) < _KEPT:
            kept.append({name: np.array(feed[name]) for name in inputs if name in feed})

    def fail(self, file: str, inputs: tuple[str, ...], feed: Mapping[str, Held], error: BundleError) -> None:
        """Remember the first graph that could not be run."""
        if self.failed is None:
            self.failed = (file, {name: np.array(feed[name]) for name in inputs if name in feed}, str(error))


class _Tapped:
    def __init__(self, capture: Capture, graph: Graph, file: str) -> None:
        self._capture, self._graph, self._file = capture, graph, file
        self.inputs = graph.inputs

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        with self._tapping(feed):
            return self._graph.run(feed)

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        with self._tapping(feed):
            return self._graph.relay(feed, fetch)

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        with self._tapping(feed):
            return self._graph.step(feed, fetch)

    @contextmanager
    def _tapping(self, feed: Mapping[str, Held]) -> Iterator[None]:
        self._capture.keep(self._file, self.inputs, feed)
        try:
            yield
        except BundleError as error:
            self._capture.fail(self._file, self.inputs, feed, error)
            raise
