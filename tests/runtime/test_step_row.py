"""The arrays of a decode step's token: the same ones for good, filled in place."""

from __future__ import annotations

import pytest

from tmc_export.runtime._step_row import StepRow


@pytest.mark.parametrize("axes", [1, 3])
def test_a_steps_row_is_filled_in_place(axes: int) -> None:
    row = StepRow(axes)
    held = dict(row.arrays)
    row.fill(7, 1 << 40, 5)
    assert all(row.arrays[name] is array for name, array in held.items())
    told = {name: array.tolist() for name, array in held.items()}
    assert told == {
        "positions": [[[7]]] * axes, "order": [[1 << 40]], "since": [[5]], "last": [0], "valid": [[True]], "text": [[True]]
    }  # fmt: skip
