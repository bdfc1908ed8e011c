"""When are two tensors of one name different, and which node makes the first one?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.verify._codes import steps_between
from tmc_export.verify.tolerances import Tolerance, tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["Difference", "bound", "compare", "wrong_nodes"]

_SLOTS = ("present.", "slots.")
"""What makes bytes codes: tensors of these names are new rows of the slots; other bytes are codes of products' inputs, around 128."""


@dataclass(frozen=True)
class Difference:
    """A tensor beyond tolerance.

    Attributes:
        tensor: its name.
        error: largest absolute difference; infinite where one is not finite or the shapes differ.
        allowed: what was allowed.
        note: in words.
    """

    tensor: str
    error: float
    allowed: float
    note: str


def bound(precision: str, rtol: float | None) -> Tolerance:
    """Return what a subgraph may differ by: the table's row, or the row with another `rtol`."""
    found = tolerance("subgraph", precision)
    return found if rtol is None else replace(found, rtol=rtol, atol=min(found.atol, rtol), reason="given")


def compare(name: str, got: Array | None, want: Array, table: Tolerance) -> Difference | None:
    """Compare one tensor: floats within `atol + rtol * max|want|`, codes (int8; fp8, which are bytes of slots) within one, everything else
    exactly; None when they agree."""
    if got is None:
        return Difference(name, float("inf"), 0.0, "is missing")
    if got.shape != want.shape:
        return Difference(name, float("inf"), 0.0, f"has shape {list(got.shape)}, not {list(want.shape)}")
    if got.dtype.kind != "f" or want.dtype.kind != "f":
        slots = got.dtype == want.dtype == np.uint8 and name.startswith(_SLOTS)
        allowed = float(slots or got.dtype == want.dtype == np.int8)  # what lies half-way between two codes may be either
        off = steps_between(got, want) if slots else np.abs(got.astype(np.float64) - want.astype(np.float64))
        if not (off > allowed).any():
            return None
        return Difference(name, float(off.max()), allowed, f"differs in {int((off > 0).sum())} of {got.size} places")
    a, b = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(b)
    if not (np.isfinite(a) == finite).all() or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return Difference(name, float("inf"), 0.0, f"{int((~np.isfinite(a)).sum())} of {a.size} values are not finite")
    allowed = table.atol + table.rtol * float(np.abs(b[finite]).max(initial=0.0))
    error = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
    return Difference(name, error, allowed, f"differs by {error:.3g}, allowed {allowed:.3g}") if error > allowed else None


def wrong_nodes(model: Any, got: Mapping[str, Array], want: Mapping[str, Array], table: Tolerance) -> Iterator[tuple[int, Difference]]:
    """Yield (index of the node, its worst output) for every node beyond tolerance, in order.

    Tensors without a value on both sides are passed over.
    """
    for index, node in enumerate(model.graph.node):
        found = [compare(name, got[name], want[name], table) for name in node.output if name in got and name in want]
        differing = [d for d in found if d is not None]
        if differing:
            yield index, max(differing, key=lambda d: d.error)
