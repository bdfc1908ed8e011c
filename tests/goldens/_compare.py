"""Compare outputs with a golden, element by element."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from tests.goldens._cases import Case, Program

# name -> (absolute, relative), and why.
TOLERANCES: dict[str, tuple[float, float]] = {
    # one mean, product or interpolation in float32 in another order of summation; values are of size 1 to 10
    "values": (1e-5, 1e-5),
    # twelve merges in a row, each a float32 average of averages
    "chained": (5e-5, 5e-5),
    # row sums of |U S|: float32 SVD against float32 products; the golden's own float32 error is 4e-6 of 100 (measured against float64)
    "spectrum": (2e-3, 2e-5),
}


def differences(case: Case, program: Program, got: Mapping[str, np.ndarray], without: Collection[str] = ()) -> list[str]:
    """Return every difference as a sentence; an empty list means equal.

    A golden output that nobody compares is a difference, but for the names in `without` (a program's details in onnxruntime).
    """
    found = [f"{name}: an output without a golden counterpart" for name in got if name not in case.outputs]
    for name, want in case.outputs.items():
        if name in program.skipped or name in without:
            continue
        if name not in got:
            found.append(f"{name}: missing")
            continue
        found += _one(case, program, name, got[name], want)
    return found


def _one(case: Case, program: Program, name: str, got: np.ndarray, want: np.ndarray) -> list[str]:
    if got.shape != want.shape:
        return [f"{name}: shape {got.shape}, golden {want.shape}"]
    if not case.decided:
        return []  # rounding decides what is kept: only the shapes are the method's
    if want.dtype.kind in "iub":
        wrong = int((got != want).sum())
        return [f"{name}: {wrong} of {want.size} indices differ"] if wrong else []
    kind = "spectrum" if name in ("sv_scores",) else program.tolerance
    absolute, relative = TOLERANCES[kind]
    excess = np.abs(got.astype(np.float64) - want.astype(np.float64)) - (absolute + relative * np.abs(want.astype(np.float64)))
    if want.size and not excess.max() <= 0:
        return [f"{name}: off by {np.abs(got - want).max():.3g}, allowed {absolute:g} + {relative:g} of the value"]
    return []
