"""Picking the one row there is."""

from __future__ import annotations

import numpy as np
import onnx_ir.passes.common as common
import pytest

from tests.passes._models import graph, operators, run
from tmc_export.passes.drop_empty_inputs import DropEmptyInputsPass
from tmc_export.passes.pick_only_row import PickOnlyRowPass

STEP = """(float[1, 1, 4] x, int64[1] last) => (float[1, 4] y) {
  h = Neg(x)  i = Reshape(last, one)  e = Expand(i, wide)  g = GatherElements<axis = 1>(h, e)  r = Gather<axis = 1>(g, zero)  y = Neg(r)
}"""
NUMBERS = {"one": np.array([1, 1, 1]), "wide": np.array([1, 1, 4]), "zero": np.array(0)}
X = {"x": np.random.default_rng(0).standard_normal((1, 1, 4)).astype(np.float32), "last": np.zeros(1, np.int64)}


def test_the_row_of_one_token_is_only_reshaped() -> None:
    before, after = (common.ShapeInferencePass()(graph(STEP, **NUMBERS)).model for _ in range(2))
    assert PickOnlyRowPass()(after).modified
    common.RemoveUnusedNodesPass()(after)
    DropEmptyInputsPass()(after)
    assert operators(after) == ["Neg", "Reshape", "Neg"] and [v.name for v in after.graph.inputs] == ["x"]
    np.testing.assert_array_equal(run(after, X)[0], run(before, X)[0])
    assert not PickOnlyRowPass()(after).modified


@pytest.mark.parametrize(
    "text",
    [
        "(float[1, 2, 4] x, int64[1, 2, 4] i) => (float[1, 2, 4] y) { h = Neg(x)  y = GatherElements<axis = 1>(h, i) }",
        "(float[1, 1, 4] x, int64[1, 1, 4] i) => (float[1, 1, 4] y) { h = Neg(x)  y = GatherElements<axis = 2>(h, i) }",
        "(float[1, 1, 4] x, int64[1, 1, 2] i) => (float[1, 1, 2] y) { h = Neg(x)  y = GatherElements<axis = 1>(h, i) }",
        "(float[1, 1, 4] x, int64[1] i) => (float[1, 1, 4] y) { h = Neg(x)  y = Gather<axis = 1>(h, i) }",
        "(float[1, 2, 4] x, int64 i) => (float[1, 4] y) { h = Neg(x)  y = Gather<axis = 1>(h, i) }",
        "(float[1, 1, 4] x, int64[1, 1, 4] i) => (float[1, 1, 4] y) { y = GatherElements<axis = 1>(x, i) }",
        "(float[1, 1, 4] x, int64[1, 1, 4] i) => (float[1, 1, 4] y, float[1, 1, 4] h) { h = Neg(x)  y = GatherElements<axis = 1>(h, i) }",
    ],
    ids=["two rows", "along channels", "of some channels", "a list of rows", "one of two", "an input returned", "an output returned"],
)
def test_what_picks_among_more_or_returns_what_is_not_its_own_stays(text: str) -> None:
    assert not PickOnlyRowPass()(common.ShapeInferencePass()(graph(text)).model).modified
