"""Keys and values as a bundle's slots hold them: what the reference's rows are fed as, and what comes back is compared as. No torch.

Legend: g KV heads, T tokens, C slots, d channels of a head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from tmc_export.bundle.program import Program, SlotCodes
from tmc_export.verify._codes import codes_of, numbers_of, steps_between
from tmc_export.verify.compare import Check, compare_tensor
from tmc_export.verify.tolerances import Tolerance

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

__all__ = ["compare_rows", "filled_slots"]

_TURNED = 0.005
"""Share of a tensor's codes, at least one, that may be the one beside: what lies half-way turns with the order that sums are made in."""


def filled_slots(program: Program, name: str, rows: Array, slots: int) -> Array:
    """Return `[1, g, slots, d]` with rows of the reference in the first slots.

    Args:
        program: how slots are stored.
        name: `<layer>.key` or `<layer>.value`.
        rows: `[g, T, d]`, rounded already where slots are codes.
        slots: C.
    """
    found = np.zeros((1, rows.shape[0], slots, rows.shape[2]), program.slot_dtype)
    found[0, :, : rows.shape[1]] = rows if program.kv is None else _codes(program.kv, name, rows)
    return found


def compare_rows(
    label: str, program: Program, name: str, got: Array | None, want: Array, tolerance: Tolerance, precision: str, file: str
) -> Check:
    """Compare new rows of one tensor with the reference's.

    Codes are compared as what they stand for; where all else is float32, as codes: almost all must be equal, and none more than one off.

    Args:
        label: of the check.
        program: how slots are stored.
        name: `<layer>.key` or `<layer>.value`.
        got: `[g, T, d]` as the graph returned them; None when the output is missing.
        want: `[g, T, d]`.
        tolerance: for tensors.
        precision: row of the tables.
        file: that made them.
    """
    if program.kv is None or got is None:
        return compare_tensor(label, got, want, tolerance, file)
    kind = program.kv.dtype
    if got.dtype != np.dtype(program.kv.held):
        return Check(label, file, False, f"is {got.dtype}, the slots are {kind}, held as {program.kv.held}")
    check = compare_tensor(label, numbers_of(kind, got) * _column(program.kv, name), want, tolerance, file)
    if precision != f"{kind} slots" or check.metrics is None:
        return check
    off = steps_between(got, _codes(program.kv, name, want))
    turned, worst, allowed = int((off > 0).sum()), int(off.max(initial=0)), max(1, int(_TURNED * off.size))
    fine = worst <= 1 and turned <= allowed
    note = "" if fine else f"{turned} of {off.size} codes differ, by up to {worst}; {allowed} may, by 1"
    return replace(check, passed=fine, note=note)


def _column(codes: SlotCodes, name: str) -> Array:
    return np.array(codes.scales[name], np.float32)[:, None, None]


def _codes(codes: SlotCodes, name: str, rows: Array) -> Array:
    return codes_of(codes.dtype, rows.astype(np.float64) / _column(codes, name))
