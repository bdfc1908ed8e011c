"""A bundle's subgraphs run as the torch modules that they were traced from: what calibration looks into.

A backend like any other, so that the runtime's own session drives it: chat template, picture rule, cuts with their selection and all.
Weights come from the checkpoint one submodule at a time (`export.materialize`); a model whose weights exceed the memory runs, slowly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tmc_export.api._schemes import GraphKind
from tmc_export.core.errors import ExportError
from tmc_export.export.materialize import WeightCache, materialized
from tmc_export.runtime._backend import Held, Outputs
from tmc_export.runtime._host import HostMemory

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["EagerBackend", "Runnable", "parameter_names", "running_kind", "running_rows"]

_RUNNING: ContextVar[tuple[GraphKind | None, Tensor | None]] = ContextVar("tmc_running", default=(None, None))


def running_kind() -> GraphKind | None:
    """What the subgraph that runs holds."""
    return _RUNNING.get()[0]


def running_rows() -> Tensor | None:
    """Which rows of the block that runs are tokens, `[b, T]` bool; None where every row is one."""
    return _RUNNING.get()[1]


@contextmanager
def _running(kind: GraphKind | None, valid: Tensor | None) -> Iterator[None]:
    token = _RUNNING.set((kind, valid))
    try:
        yield
    finally:
        _RUNNING.reset(token)


@dataclass(frozen=True)
class Runnable:
    """A module and how a graph traced from it is called.

    Attributes:
        module: on the meta device.
        inputs: names, in the order of `forward`.
        examples: an input each; shapes and dtypes count.
        symbols: per input, axis → name of its symbolic dimension.
        outputs: names, in the order of what `forward` returns.
        kind: of the graph that is traced from it.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    examples: tuple[Tensor, ...]
    symbols: tuple[Mapping[int, str] | None, ...]
    outputs: tuple[str, ...]
    kind: GraphKind | None = None


class EagerGraph:
    """One subgraph; see `runtime._backend.Graph`. Floating inputs and outputs are float32."""

    def __init__(self, runnable: Runnable, weights: Callable[[nn.Module], Any]) -> None:
        self._runnable, self._weights = runnable, weights
        self.inputs = runnable.inputs

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run once; a past that is not fed has no slots.

        Raises:
            ExportError: an input is missing.
        """
        given = [self._input(i, feed) for i in range(len(self._runnable.inputs))]
        valid = given[self.inputs.index("valid")] if "valid" in self.inputs else None
        with self._weights(self._runnable.module), _running(self._runnable.kind, valid), torch.no_grad():
            found = self._runnable.module(*given)
        values = found if isinstance(found, tuple) else (found,)
        return {name: _array(value) for name, value in zip(self._runnable.outputs, values, strict=True)}

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """As `run`: every output is in the host's memory."""
        found = self.run(feed)
        return Outputs(found, found)

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """As `relay`: the new rows are returned."""
        return self.relay(feed, fetch)

    def _input(self, index: int, feed: Mapping[str, Held]) -> Tensor:
        name, example = self._runnable.inputs[index], self._runnable.examples[index]
        axes = self._runnable.symbols[index] or {}
        if name in feed and not (feed[name].shape[0] == 0 and example.shape[0]):
            value = torch.from_numpy(np.asarray(feed[name]))
            return value.float() if value.is_floating_point() else value
        if "P" not in axes.values():
            raise ExportError(f"the input '{name}' of {type(self._runnable.module).__name__} is missing")
        shape = [0 if axes.get(axis) == "P" else size for axis, size in enumerate(example.shape)]
        return torch.zeros(shape, dtype=torch.float32 if example.is_floating_point() else example.dtype)


def _array(value: Tensor) -> Array:
    found: np.ndarray[Any, Any] = (value.float() if value.is_floating_point() else value).contiguous().numpy()
    return found


class EagerBackend(HostMemory):
    """Opens the subgraphs of one export.

    Args:
        runnables: by the bundle file that each is the module of; the phases of a block share one module.
        weights: per file, identity of a parameter → its name, and where weights are read by that name.

    Attributes:
        runnables: as given.
    """

    name = "eager"

    def __init__(self, runnables: Mapping[str, Runnable], weights: Mapping[str, tuple[Mapping[int, str], WeightCache]]) -> None:
        self.runnables, self._weights = runnables, weights
        self._graphs: dict[str, EagerGraph] = {}

    def graph(self, file: str) -> EagerGraph:
        """Return the subgraph of a bundle file.

        Raises:
            ExportError: no module was made for it.
        """
        if file not in self.runnables:
            raise ExportError(f"no module was made for {file}; made are: {', '.join(sorted(self.runnables))}")
        if file not in self._graphs:
            names, cache = self._weights[file]
            self._graphs[file] = EagerGraph(self.runnables[file], lambda m: materialized(m, names, cache))
        return self._graphs[file]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """Identity of every parameter of a model → its first name; tied ones have one."""
    return {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
