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


def test_a_kernel_that_is_read_as_a_matrix() -> None:
    kernel = np.random.default_rng(2).normal(size=(5, 2, 2, 1)).astype(np.float32)
    text = "(float[3, 4] x) => (float[3, 5] y) { r = Reshape(w, sizes)  t = Transpose<perm = [1, 0]>(r)  y = MatMul(x, t) }"
    joined = text.replace("{ r", "{ a = Constant<value_ints = [5]>()  b = Constant<value_ints = [-1]>()  sizes = Concat<axis = 0>(a, b)  r")
    models = [graph(text, w=kernel, sizes=np.array(sizes)) for sizes in ([5, -1], [5, 4], [-1, 4])]
    for model in [*models, graph(joined, w=kernel)]:
        assert FoldWeightTransposesPass()(model).modified
        assert [o for o in operators(model) if o not in ("Constant", "Concat")] == ["MatMul"]
        assert model.graph.initializers["w.as_matrix.transposed_10"].shape == (4, 5)
        np.testing.assert_allclose(run(model, {"x": X})[0], X @ kernel.reshape(5, 4).T, rtol=1e-5)
        assert np.abs(run(model, {"x": X})[0] - X @ kernel.reshape(4, 5)).max() > 0.1


def test_a_reshape_of_activations_or_to_other_ranks_stays() -> None:
    text = "(float[3, 4] x) => (float[3, 2, 2] y) { r = Reshape(w, sizes)  a = Reshape(x, sizes)  y = Add(a, r) }"
    model = graph(text, w=np.ones((3, 1, 4), np.float32), sizes=np.array([3, 2, 2]))
    assert not FoldWeightTransposesPass()(model).modified
