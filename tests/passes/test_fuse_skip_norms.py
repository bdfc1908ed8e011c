"""A residual sum and its norm as one operator, compared with the nodes it takes the place of."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from tests.passes._models import graph, operators, run
from tmc_export.passes.fuse_skip_norms import FuseSkipNormsPass

NORM = """(float[1, 1, 8] a, float[1, 1, 8] b) => (float[1, 1, 8] y, float[1, 1, 8] s)
<float[1, 1, 8] p, float[1, 1, 1] m, float[1, 1, 1] e, float[1, 1, 1] r, float[1, 1, 8] n> {
  s = Add(a, b)  p = Pow(s, two)  m = ReduceMean<keepdims = 1>(p, axis)  e = Add(m, epsilon)  r = Sqrt(e)  n = Div(s, r)  y = Mul(weight, n)
}"""
WITHIN = NORM.replace(", float[1, 1, 8] s)", ")").replace("<float", "<float[1, 1, 8] s, float", 1)
"""The graph does not return the sum."""
X = {name: np.random.default_rng(seed).standard_normal((1, 1, 8)).astype(np.float32) for seed, name in enumerate("ab")}


def norm(text: str = NORM, **changed: np.ndarray) -> ir.Model:
    weights = {
        "two": np.array(2.0, np.float32), "axis": np.array([-1]), "epsilon": np.array(1e-2, np.float32),
        "weight": np.linspace(0.5, 2, 8, dtype=np.float32),
    }  # fmt: skip
    return graph(text, **{name: array for name, array in (weights | changed).items() if name in text})


@pytest.mark.parametrize(
    "text",
    [
        NORM,
        NORM.replace("Mul(weight, n)", "Mul(n, weight)").replace("Add(m, epsilon)", "Add(epsilon, m)"),
        WITHIN.replace("8] y)", "8] y, float[1, 1, 8] z)").replace("Mul(weight, n)", "Mul(weight, n)  z = Add(s, a)"),
        WITHIN,
    ],
    ids=["as exported", "the other way round", "a residual reads the sum", "only the norm reads the sum"],
)
def test_sum_and_norm_are_one_operator_and_the_same_numbers(text: str) -> None:
    before, after = norm(text), norm(text)
    for value in after.graph.outputs:  # the shapes that a traced graph has
        value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in after.graph:
        for value in node.outputs:
            value.type = ir.TensorType(ir.DataType.FLOAT)
    assert FuseSkipNormsPass()(after).modified
    RemoveUnusedNodesPass()(after)
    assert operators(after) == ["SkipSimplifiedLayerNormalization", *(["Add"] if "z" in text else [])]
    assert [v.name for v in after.graph.outputs] == [v.name for v in before.graph.outputs]
    for got, want in zip(run(after, X), run(before, X), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
    other = run(norm(text, epsilon=np.array(2e-2, np.float32)), X)[0]
    assert np.abs(other - run(after, X)[0]).max() > 1e-4  # the epsilon is the graph's own
    assert not FuseSkipNormsPass()(after).modified


def test_a_norm_that_reads_a_row_of_the_sum_is_followed_by_the_row() -> None:
    """As before the head, which takes `[1, d]`; a Reshape that moves elements of several rows is none."""
    text = """(float[1, 1, 8] a, float[1, 1, 8] b) => (float[1, 8] y) {
      t = Add(a, b)  s = Reshape(t, row)  p = Pow(s, two)  m = ReduceMean<keepdims = 1>(p, axis)
      e = Add(m, epsilon)  r = Sqrt(e)  n = Div(s, r)  y = Mul(weight, n)
    }"""
    before, after = (ShapeInferencePass()(norm(text, row=np.array([1, 8]))).model for _ in range(2))
    assert FuseSkipNormsPass()(after).modified
    RemoveUnusedNodesPass()(after)
    assert operators(after) == ["SkipSimplifiedLayerNormalization", "Reshape"] and [v.name for v in after.graph.outputs] == ["y"]
    np.testing.assert_allclose(run(after, X)[0], run(before, X)[0], rtol=1e-6, atol=1e-7)
    apart = text.replace("(float[1, 8] y)", "(float[2, 4] y)")
    halves = ShapeInferencePass()(norm(apart, row=np.array([2, 4]), weight=np.ones(4, np.float32))).model
    assert not FuseSkipNormsPass()(halves).modified


def test_two_norms_of_one_sum_stay_right() -> None:
    """The first takes the sum along, the second reads it."""
    again = "m2 = ReduceMean<keepdims = 1>(p, axis)  e2 = Add(m2, epsilon)  r2 = Sqrt(e2)  n2 = Div(s, r2)  z = Mul(n2, weight) }"
    text = NORM.replace("8] y,", "8] y, float[1, 1, 8] z,")[:-1] + again
    before, after = norm(text), norm(text)
    for value in (*after.graph.outputs, *(v for node in after.graph for v in node.outputs)):
        value.type = ir.TensorType(ir.DataType.FLOAT)
    assert FuseSkipNormsPass()(after).modified
    for got, want in zip(run(after, X), run(before, X), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (NORM, {"two": np.array(3.0, np.float32)}),
        (NORM, {"axis": np.array([1])}),
        (NORM, {"weight": np.ones(1, np.float32)}),
        (NORM.replace("Pow(s, two)", "Pow(a, two)"), {}),
        (NORM.replace("Div(s, r)", "Div(b, r)"), {}),
        (NORM.replace("s = Add(a, b)", "s = Sub(a, b)"), {}),
        (NORM.replace("s = Add(a, b)", "s = Add(a, bias)"), {"bias": np.ones((1, 1, 8), np.float32)}),
        (NORM.replace("float[1, 1, 8] b)", "float[1, 1, 1] b)"), {}),
        (NORM.replace("float[", "float16["), {}),
    ],
    ids=[
        "a cube",
        "another axis",
        "one weight",
        "the mean of another",
        "a quotient of another",
        "a difference",
        "a bias",
        "spread",
        "half",
    ],
)
def test_what_is_no_norm_of_a_sum_stays(text: str, changed: dict[str, np.ndarray]) -> None:
    assert not FuseSkipNormsPass()(norm(text, **changed)).modified
