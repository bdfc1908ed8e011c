from __future__ import annotations

import numpy as np
import onnx_ir.passes.common as common
import pytest

from tests.passes._models import graph, operators, run
from tmc_export.passes.merge_reshapes import MergeReshapesPass

STEP = """(float[1, 1, 12] x, float[1, 1, 1, 3] mask) => (float[1, 1, 12] y) {
  a = Reshape(x, heads)  b = Transpose<perm = [0, 2, 1, 3]>(a)  c = Mul(b, half)  d = Reshape(c, rows)  e = Reshape(d, wide)
  f = Add(e, mask)  g = Softmax<axis = -1>(f)  h = Reshape(g, rows)  i = Reshape(h, flat)  y = Identity(i)
}"""
SHAPES = {"heads": np.array([1, 1, 4, 3]), "rows": np.array([1, 2, 2, 3]), "wide": np.array([1, 4, 1, 3]), "flat": np.array([1, 1, 12])}


def test_one_reshape_is_left_before_and_after_what_needs_its_axis() -> None:
    before, after = (common.ShapeInferencePass()(graph(STEP, half=np.float32(0.5), **SHAPES)).model for _ in range(2))
    assert MergeReshapesPass()(after).modified
    common.RemoveUnusedNodesPass()(after)
    assert operators(after) == ["Reshape", "Mul", "Add", "Softmax", "Reshape", "Identity"]
    feed = {"x": np.random.default_rng(0).standard_normal((1, 1, 12)).astype(np.float32), "mask": np.zeros((1, 1, 1, 3), np.float32)}
    feed["mask"][..., 1] = -1e9
    assert run(after, feed)[0].tobytes() == run(before, feed)[0].tobytes()
    feed["mask"][..., 2] = -1e9
    assert np.abs(run(after, feed)[0] - run(before, {**feed, "mask": np.zeros((1, 1, 1, 3), np.float32)})[0]).max() > 0.1


def test_a_transpose_that_moves_rows_stays() -> None:
    model = graph("(float[1, 2, 3, 4] x) => (float[1, 3, 2, 4] y) { y = Transpose<perm = [0, 2, 1, 3]>(x) }")
    assert not MergeReshapesPass()(model).modified


@pytest.mark.parametrize(
    "node",
    ["y = Softmax<axis = 1>(a)", "y = Add(a, wide)", "y = Softmax<axis = -1>(b)  z = Identity(a)"],
    ids=["axis", "broadcast", "last axis"],
)
def test_what_reads_more_than_the_last_axis_stays_behind_the_reshape(node: str) -> None:
    text = f"(float[1, 2, 6] x) => (float[1, 4, 3] y) {{ a = Reshape(x, shape)  b = Reshape(x, shape)  {node} }}"
    wide = {"wide": np.ones((4, 3), np.float32)} if "wide" in node else {}
    before, after = (common.ShapeInferencePass()(graph(text, shape=np.array([1, 4, 3]), **wide)).model for _ in range(2))
    MergeReshapesPass()(after)
    feed = {"x": np.random.default_rng(1).standard_normal((1, 2, 6)).astype(np.float32)}
    np.testing.assert_array_equal(run(after, feed)[0], run(before, feed)[0])
    assert [o for o in operators(after) if o in ("Softmax", "Add")] == [o for o in operators(before) if o in ("Softmax", "Add")]


def test_a_returned_input_is_not_taken_for_the_output() -> None:
    model = graph("(float[2, 3] x) => (float[2, 3] y) { y = Reshape(x, shape) }", shape=np.array([2, 3]))
    MergeReshapesPass()(common.ShapeInferencePass()(model).model)
    assert [v.name for v in model.graph.outputs] == ["y"] and operators(model) == ["Reshape"]
