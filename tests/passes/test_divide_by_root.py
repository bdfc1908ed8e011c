from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.passes._models import graph, operators, run
from tmc_export.passes.divide_by_root import DivideByRootPass

NORM = """(float[2, 4] x) => (float[2, 4] y) <float v, float e> {
  s = Mul(x, x)  m = ReduceMean<keepdims = 1>(s, axis)  a = Add(m, e)  r = Sqrt(a)  i = Reciprocal(r)  n = Mul(ORDER)  y = Mul(weight, n)
}"""


def norm(order: str) -> ir.Model:
    return graph(
        NORM.replace("ORDER", order), axis=np.array([-1]), e=np.array(1e-6, np.float32), weight=np.linspace(0.5, 2, 4, dtype=np.float32)
    )


def test_a_norm_divides_and_computes_the_same() -> None:
    x = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}
    for order in ("x, i", "i, x"):
        before, after = norm(order), norm(order)
        assert DivideByRootPass()(after).modified
        assert "Reciprocal" not in operators(after) and operators(after).count("Div") == 1
        np.testing.assert_allclose(run(after, x)[0], run(before, x)[0], rtol=3e-7, atol=0)
        assert not DivideByRootPass()(after).modified


def test_a_reciprocal_that_is_read_elsewhere_stays() -> None:
    model = graph("(float[2] x) => (float[2] y, float[2] i) { r = Sqrt(x)  i = Reciprocal(r)  y = Mul(x, i) }")
    x = {"x": np.array([4.0, 9.0], np.float32)}
    assert DivideByRootPass()(model).modified
    assert sorted(operators(model)) == ["Div", "Reciprocal", "Sqrt"] and [v.name for v in model.graph.outputs] == ["y", "i"]
    np.testing.assert_allclose(run(model, x), [[2, 3], [1 / 2, 1 / 3]], rtol=3e-7)


def test_other_reciprocals_are_left_alone() -> None:
    model = graph("(float[2] x) => (float[2] y) { i = Reciprocal(x)  y = Mul(x, i) }")
    assert not DivideByRootPass()(model).modified
