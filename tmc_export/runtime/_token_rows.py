"""The token table's graph of a decode step, without a session: the graph is one Gather, and its row lies in a mapped file.

A session's run takes longer to start than to copy the row. What the graph says is what `run` does, in a session that is made for it: so
`verify` proves the graph, and a step answers as the graph does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.core.errors import BundleError
from tmc_export.runtime._backend import Graph, Held, Outputs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["TokenRows"]


class TokenRows:
    """The graph `input_ids [1, 1]` → `hidden [1, 1, c]`.

    Args:
        table: `[n, c]`, where the file is mapped.
        file: the graph's below the bundle, for messages.
        graph: opens it as a session.
        after: called after each step.
    """

    inputs: tuple[str, ...] = ("input_ids",)

    def __init__(self, table: Array, file: str, graph: Callable[[], Graph], after: Callable[[], None] | None = None) -> None:
        self._table, self._file, self._graph, self._after = table, file, graph, after
        self._hidden = np.zeros((1, 1, table.shape[1]), table.dtype)
        self._row: Array = self._hidden[0, 0]
        self._given = Outputs({"hidden": self._hidden}, {"hidden": self._hidden})

    def run(self, feed: Mapping[str, Held]) -> dict[str, Array]:
        """Run the graph; see `Graph.run`."""
        return self._graph().run(feed)

    def relay(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Run the graph; see `Graph.relay`."""
        return self._graph().relay(feed, fetch)

    def step(self, feed: Mapping[str, Held], fetch: Collection[str]) -> Outputs:
        """Copy the row of one token; see `Graph.step`.

        Raises:
            BundleError: the table has no such row.
        """
        token = int(np.asarray(feed["input_ids"]).item())
        if not 0 <= token < self._table.shape[0]:
            raise BundleError(f"{self._file} has rows for {self._table.shape[0]} tokens, none for token {token}; build the bundle again")
        self._row[:] = self._table[token]
        if self._after is not None:
            self._after()
        return self._given
