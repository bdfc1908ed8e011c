"""An export that goes on where a killed one stopped: a subgraph is a step of the build's journal, a tensor of a weight file a record.

What a finished subgraph found out is put back instead of tracing it again: its part of the program, the profiles for the engine builder,
the states that it hands on, the weights that a scheme has changed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from pydantic import TypeAdapter

from tmc_export.bundle.journal import Journal
from tmc_export.export.store import Place, WeightStore
from tmc_export.surgery._states import Handed

if TYPE_CHECKING:
    from tmc_export.api.exporter import Exporter

__all__ = ["journaled_store", "step"]

T = TypeVar("T")


def journaled_store(folder: Path, journal: Journal) -> WeightStore:
    """Return a store that knows what an earlier build has written, and records what it writes.

    Args:
        folder: `onnx/` in the journal's folder.
        journal: of the build.
    """
    below = folder.name + "/"

    def wrote(key: str, place: Place, data: bytes) -> None:
        journal.wrote(key, (below + place[0], *place[1:]), data)

    kept = {key: (file.removeprefix(below), offset, length) for key, (file, offset, length) in journal.places.items()}
    return WeightStore(folder, kept, wrote)


def step(work: Exporter, name: str, kind: Any, make: Callable[[], T]) -> T:
    """Make a subgraph, or put back what an earlier build made.

    Args:
        work: the exporter, with or without a journal.
        name: of the step, `"block_0"`.
        kind: type of what `make` returns.
        make: makes the subgraph with `work`.
    """
    if work.journal is None:
        return make()
    adapter: TypeAdapter[T] = TypeAdapter(kind)
    if name in work.journal.steps:
        done = work.journal.steps[name]
        _restore(work, done["state"])
        return adapter.validate_python(done["program"])
    work.saved.clear()
    made = make()
    work.journal.finish(name, work.saved, {"program": adapter.dump_python(made, mode="json"), "state": _state(work)})
    return made


def _state(work: Exporter) -> dict[str, Any]:
    """What later subgraphs and the end of the export need of all those so far."""
    handed = {
        str(entry): [[h.name, list(h.shape), str(h.dtype).removeprefix("torch.")] for h in states] for entry, states in work.handed.items()
    }
    return {"profiles": work.profiles, "handed": handed, "schemes": work.schemes.counts()}


def _restore(work: Exporter, state: dict[str, Any]) -> None:
    work.profiles[:] = state["profiles"]
    work.handed = {
        int(entry): [Handed(int(entry), name, tuple(shape), getattr(torch, dtype)) for name, shape, dtype in states]
        for entry, states in state["handed"].items()
    }
    work.schemes.restore(state["schemes"])
