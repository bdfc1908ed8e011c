"""What rounding does to each subgraph by itself: run twice on float32's inputs, with stages choosing as in float32."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.api.eager import EagerBackend, EagerGraph
from tmc_export.api.simulation import Simulation
from tmc_export.runtime._backend import Held
from tmc_export.surgery.replay import Choices, replaying, writing_down

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["SubgraphNoise"]

_PHASES = ("_prefill", "_chunk", "_decode")
_ROWS = ("hidden_out", "hidden")
"""Outputs that count tokens along axis 1, those of padding among them."""
_SLOTS = "present."


class SubgraphNoise(EagerBackend):
    """Runs every graph twice, and remembers squares of what it gives in float32, and of what rounding changes of it.

    What the graphs return is float32's.

    Args:
        simulation: does the rounding.
        names: what is rounded.
    """

    def __init__(self, simulation: Simulation, names: Collection[str]) -> None:
        super().__init__(simulation.backend.runnables, simulation.weights)
        self._simulation, self._names = simulation, frozenset(names)
        self._sums: dict[str, dict[str, list[float]]] = {}

    def graph(self, file: str) -> EagerGraph:
        """As `EagerBackend.graph`."""
        return _Twice(file, super().graph(file), self)

    def sqnr_db(self) -> dict[str, dict[str, float]]:
        """Subgraph → output → signal to noise in dB; infinite where nothing is rounded.

        Outputs are `tokens` (vision), `hidden` (the token table), `hidden_out` or `logits` and `keys` and `values` (blocks), and what a
        compress graph hands on, `hidden_out`.
        """
        return {
            graph: {name: float("inf") if not noise else 10 * float(np.log10(signal / noise)) for name, (signal, noise) in outputs.items()}
            for graph, outputs in self._sums.items()
        }

    def run(self, file: str, graph: EagerGraph, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run in float32 and rounded; return the former."""
        choices = Choices()
        with writing_down(choices):
            want = graph.run(feed)
        with self._simulation.rounding(self._names), replaying(choices):
            got = graph.run(feed)
        self._add(_graph(file), want, got, feed)
        return want

    def _add(self, graph: str, want: Mapping[str, Array], got: Mapping[str, Array], feed: Mapping[str, Held]) -> None:
        valid = np.asarray(feed["valid"])[0] if "valid" in feed else None
        sums = self._sums.setdefault(graph, {})
        for name, value in want.items():
            if name.startswith(_SLOTS):
                label, rows = ("keys" if name.endswith(".key") else "values"), 2
            elif name in ("tokens", "logits", *_ROWS):
                label, rows = name, 1
            else:
                continue
            a, b = value.astype(np.float64), got[name].astype(np.float64)
            if valid is not None and name != "logits" and value.shape[rows] == valid.shape[0]:
                a, b = np.compress(valid, a, axis=rows), np.compress(valid, b, axis=rows)
            total = sums.setdefault(label, [0.0, 0.0])
            total[0] += float((a * a).sum())
            total[1] += float(np.square(a - b).sum())


class _Twice(EagerGraph):
    """A graph that reports to `SubgraphNoise`."""

    def __init__(self, file: str, graph: EagerGraph, noise: SubgraphNoise) -> None:
        self._file, self._graph, self._noise = file, graph, noise
        self.inputs = graph.inputs

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        return self._noise.run(self._file, self._graph, feed)


def _graph(file: str) -> str:
    """`onnx/block_0_prefill.onnx` → `block_0`."""
    stem = Path(file).stem
    return next((stem.removesuffix(phase) for phase in _PHASES if stem.endswith(phase)), stem)
