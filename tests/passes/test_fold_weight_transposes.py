from __future__ import annotations

import numpy as np

from tests.passes._models import graph, operators, run
from tmc_export.passes.fold_weight_transposes import FoldWeightTransposesPass

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)


def test_before_and_after() -> None:
    text = "(float[3, 4] x) => (float[3, 2] y) { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }"
    before = run(graph(text, w=W), {"x": X})
    model = graph(text, w=W)
    assert FoldWeightTransposesPass()(model).modified
    assert operators(model) == ["MatMul"]
    (name,) = model.graph.initializers
    assert name == "w.transposed_10" and model.graph.initializers[name].const_value.shape == (4, 2)  # type: ignore[union-attr]
    np.testing.assert_array_equal(run(model, {"x": X})[0], before[0])
    assert not FoldWeightTransposesPass()(model).modified


def test_default_order_reverses_and_two_readers_share() -> None:
    w = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    text = "(float[4, 3, 2] x) => (float[4, 3, 2] y, float[4, 3, 2] z) { a = Transpose(w)  b = Transpose(w)  y = Add(x, a)  z = Mul(x, b) }"
    x = np.ones((4, 3, 2), np.float32)
    model = graph(text, w=w)
    FoldWeightTransposesPass()(model)
    assert operators(model) == ["Add", "Mul"] and list(model.graph.initializers) == ["w.transposed_210"]
    np.testing.assert_array_equal(run(model, {"x": x})[1], w.transpose())


def test_a_weight_that_is_also_read_as_it_is_stays() -> None:
    square = np.arange(16, dtype=np.float32).reshape(4, 4)
    model = graph("(float[3, 4] x) => (float[3, 4] z) { t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t)  z = MatMul(y, w) }", w=square)
    before = X @ square.T @ square
    FoldWeightTransposesPass()(model)
    assert set(model.graph.initializers) == {"w", "w.transposed_10"}
    np.testing.assert_allclose(run(model, {"x": X})[0], before, rtol=1e-5)


def test_a_transpose_of_activations_is_refused() -> None:
    model = graph("(float[3, 4] x) => (float[2, 3] y) { t = Transpose<perm = [1, 0]>(x)  y = MatMul(w, t) }", w=W)
    assert not FoldWeightTransposesPass()(model).modified
    assert operators(model) == ["Transpose", "MatMul"]
