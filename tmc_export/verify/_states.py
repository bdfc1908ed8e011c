"""States that graphs hand to later graphs, as the reference has them: what to feed a cut with, and whether what leaves a graph is right.

The reference knows no padding: a text axis may be shorter than the graph's, and pictures may be missing; what is missing is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import StateProgram
from tmc_export.graphs._contract import Site
from tmc_export.verify._trace import StageTrace
from tmc_export.verify.compare import Check, compare_tensor
from tmc_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["compare_states", "entering_state"]


def entering_state(state: StateProgram, layer: int, stages: Sequence[StageTrace]) -> Array:
    """Return a state as the cut at a decoder layer gets it: what the entry's last stage before it left of every picture."""
    found = np.zeros(state.shape, state.dtype)
    before = [s for s in stages if s.entry == state.entry and not (s.at.startswith("decoder") and (Site.parse(s.at).layer or 0) >= layer)]
    for trace in _last(before):
        value = trace.states[state.name]
        found[_corner(max(trace.picture - 1, 0), value)] = value[0]
    return found


def compare_states(
    label: str, states: Sequence[StateProgram], out: Mapping[str, Array], stages: Sequence[StageTrace], tolerance: Tolerance, file: str
) -> Iterator[Check]:
    """Compare what leaves a graph with what the reference's stages at that place handed on.

    Args:
        label: what is compared.
        states: those that leave.
        out: the graph's outputs.
        stages: the reference's, of this graph.
        tolerance: for tensors.
        file: the graph's.
    """
    for state in states:
        for trace in _last([s for s in stages if s.entry == state.entry]):
            want = trace.states[state.name]
            got = out.get(state.output)
            item = max(trace.picture - 1, 0) if got is not None and got.shape[0] > 1 else 0
            mine = None if got is None else got[_corner(item, want)].astype(np.float32)
            name = f"{label}/{state.output} of picture {trace.picture}"
            yield compare_tensor(name, mine, want[0].astype(np.float32), tolerance, file)


def _last(traces: Sequence[StageTrace]) -> list[StageTrace]:
    """The last trace of every picture."""
    return list({t.picture: t for t in traces}.values())


def _corner(item: int, value: Array) -> tuple[Any, ...]:
    """Where the reference's value `[1, …]` lies in the graph's, of this item."""
    return (item, *(slice(0, size) for size in value.shape[1:]))
